"""The modules of DeepSeek-OCR: names, parameters, and the operators that each runs in its own forward."""
