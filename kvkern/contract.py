"""The numeric contract's constants and ids; csrc_ref/contract.h is the twin, and a test compares them bit for bit."""

from __future__ import annotations

CONTRACT_ID = "eager-bf16-v1"

TILE_TOKENS = 64
"""Tokens of one tile, and lanes of one score chain."""
SUM_LANES = 16
"""Lanes of the softmax sum (A4)."""
KEY_RUN = 512
"""Keys of one output chain under the contract (A5)."""
KEY_RUN_LONG = 1024
"""Keys of one output chain in stock, for 2 query rows or more over more than 1,024 keys."""

LINEAR_RUN = 512
"""Terms of one chain of a Linear (B1)."""
LINEAR_RUN_LONG = 1024
"""The same above LINEAR_LONG_ABOVE input channels."""
LINEAR_LONG_ABOVE = 1024
NORM_WIDTH_STEP = 32
"""RMSNorm (B2) is defined for multiples of this width, below NORM_WIDTH_LIMIT."""
NORM_WIDTH_LIMIT = 8192

SILU_TABLE_SHA256 = "7f43c941b6e541e28e7e26fff8b8612cf2e9bb1e1d78f00bf816ac5e784552bc"
"""SHA-256 of the table of SiLU (B4): 65,536 bf16, little-endian, by the bits of the argument."""

KNOWN_ROPE_TABLES = {
    "9ec017073283cf0716de7d92caca03e29d66df36485557cbd25a20e942d2512d": "SmolLM2-135M",
    "2a77d5f30da2df5cac61656f846ce0d3ac3e1e71574703e04c45c1dc78986056": "the small Qwen3 of the tests",
    "74e78c430f6b6045c4809b42f473c42432a52079669a20d4139c7e5f801e7cda": "Qwen3-0.6B, 1.7B, 4B, 8B, 14B",
    "fb39551b63097c1d197f7f2d2e4dcce4096abaa7ecc0b85cd96c84d6919c1a07": "Qwen3-4B-Instruct-2507",
    "56e897faf8db5ba912c86f355329f23f860511b235f30ed6e3cd7947d2dbddb9": "Llama-3.2-1B",
    "4947742cb66b24a030f7578f8843d4e0285dc6323c4992ee848a8b803def6fbb": "Llama-3.2-3B",
}
"""SHA-256 of RoPE tables (B3) that a contract host has made, to the models that use them."""

EXP_LOG2E = float.fromhex("0x1.715476p+0")
EXP_LN2_HI = float.fromhex("0x1.62e4p-1")
EXP_LN2_LO = float.fromhex("0x1.7f7d1cp-20")
EXP_C6 = float.fromhex("0x1.a057b4p-13")
EXP_C5 = float.fromhex("0x1.6d2d92p-10")
EXP_C4 = float.fromhex("0x1.11114cp-7")
EXP_C3 = float.fromhex("0x1.5554f4p-5")
EXP_C2 = float.fromhex("0x1.555556p-3")
EXP_C1 = float.fromhex("0x1p-1")
EXP_MIN = -104.0

BF16_NAN = 0x7FC0


def stock_key_run(query_rows: int, columns: int) -> int:
    """Return the run length of stock eager for one reader's call.

    Args:
        query_rows: the reader's own query rows in this call, before any split.
        columns: all of its keys in this call, masked ones included.
    """
    return KEY_RUN if query_rows == 1 or columns <= 1024 else KEY_RUN_LONG
