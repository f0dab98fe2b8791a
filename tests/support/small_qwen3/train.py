"""Train the small byte-token Qwen3 that the tests load, on text that ships with Python.

Run `python tests/support/small_qwen3/train.py --minutes 7.5`; it writes beside this file unless `--out` says
otherwise. On shared cores set `OMP_WAIT_POLICY=PASSIVE`, or the threads spend the time waiting for each other.
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
HELD_OUT_TOPIC = "import"  # shares no passage with another topic
SAMPLE_PROMPT = "The import statement\n********************\n\nThe "
EVAL_SEQ_LEN = 1024
# (share of the training time at which the stage ends, batch, sequence length)
STAGES = ((0.35, 4, 128), (0.65, 2, 256), (0.92, 1, 512), (0.98, 1, 1024), (1.0, 1, 2048))


def build_config() -> Qwen3Config:
    """Return the configuration of the small model."""
    return Qwen3Config(
        vocab_size=259,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=False,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def encode(text: str) -> list[int]:
    """Return the utf-8 bytes of `text` as token ids, without special tokens."""
    return list(text.encode("utf-8"))


def decode(ids: list[int]) -> str:
    """Return the text of `ids`, leaving out special tokens and replacing broken utf-8."""
    return bytes(i for i in ids if i < PAD_ID).decode("utf-8", errors="replace")


def training_ids() -> torch.Tensor:
    """Return `[num_tokens] int64`: every topic but the held-out one, each paragraph once."""
    ids: list[int] = []
    seen: set[str] = set(topics[HELD_OUT_TOPIC].split("\n\n"))
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [p for p in topics[name].split("\n\n") if p not in seen]
        seen.update(paragraphs)
        if name != HELD_OUT_TOPIC and paragraphs:
            ids += [BOS_ID, *encode("\n\n".join(paragraphs)), EOS_ID]
    return torch.tensor(ids)


def draw_batch(ids: torch.Tensor, batch: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """Return `[batch, seq_len] int64` windows of `ids` at random places."""
    starts = torch.randint(0, len(ids) - seq_len + 1, (batch,), generator=generator)
    return torch.stack([ids[start : start + seq_len] for start in starts.tolist()])


def train(model: Qwen3ForCausalLM, ids: torch.Tensor, seconds: float, peak_lr: float, seed: int) -> int:
    """Train `model` for `seconds` with AdamW, warm-up and a cosine schedule over time; return the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    model.train()
    step, recent_nats, began = 0, 0.0, time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        progress = elapsed / seconds
        _, batch, seq_len = next(stage for stage in STAGES if progress <= stage[0])
        lr = peak_lr * min(1.0, (step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens = draw_batch(ids, batch, seq_len, generator)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, recent_nats = step + 1, recent_nats + loss.item()
        if step % 50 == 0:
            bits, recent_nats = recent_nats / 50 / math.log(2), 0.0
            print(f"step {step:5d}  {elapsed:4.0f} s  seq_len {seq_len:4d}  bits per byte {bits:.3f}", flush=True)
    return step


@torch.no_grad()
def bits_per_byte(model: Qwen3ForCausalLM, text: str) -> float:
    """Return the mean code length of `text` in bits per byte, in separate windows of `EVAL_SEQ_LEN` bytes."""
    total_nats, ids = 0.0, encode(text)
    for start in range(0, len(ids), EVAL_SEQ_LEN):
        tokens = torch.tensor([BOS_ID, *ids[start : start + EVAL_SEQ_LEN]])
        logits = model(tokens[None]).logits[0, :-1].float()
        total_nats += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
    return total_nats / math.log(2) / len(ids)


def main() -> None:
    """Train, save in bf16, then measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    model = Qwen3ForCausalLM._from_config(build_config(), attn_implementation="sdpa", dtype=torch.float32)
    ids = training_ids()
    print(f"{model.num_parameters():,} parameters, {len(ids):,} training tokens")
    steps = train(model, ids, args.minutes * 60, args.lr, args.seed)

    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    saved = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16, attn_implementation="eager").eval()
    figure = bits_per_byte(saved, topics[HELD_OUT_TOPIC])
    print(f"{steps} steps; held-out topic {HELD_OUT_TOPIC!r}: {figure:.3f} bits per byte")
    prompt = torch.tensor([encode(SAMPLE_PROMPT)])
    print(decode(saved.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=300)[0].tolist()))


if __name__ == "__main__":
    main()
