"""DeepSeek-OCR in plain PyTorch: module, class and parameter names as in the published checkpoint."""

from stage_runners.deepseek_ocr.decoder import ATTENTION_IMPLEMENTATIONS
from stage_runners.deepseek_ocr.model import DeepseekOCRForCausalLM

__all__ = ["ATTENTION_IMPLEMENTATIONS", "DeepseekOCRForCausalLM"]
