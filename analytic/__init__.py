"""The analytic cost engine: what every module of DeepSeek-OCR should cost. Runs without torch."""
