"""Train a small Llama and its byte-level BPE tokenizer on text files; write a Hugging Face folder.

The model that the package ships was made with:
    python tests/demo_model/train.py TEXT... --out zqfp_convert/demo/model \\
        --minutes 4 --seq-len 1024 --batch 32

TEXT is plain .txt or .xz. The last 1 % of the tokens is held out; the folder is read back and
measured on it. The weights saved are a moving average, in bf16.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

BOS = "<|endoftext|>"  # the first special token and so id 0; eos as well
MAX_POSITIONS = 1024
BOS_WINDOWS = 0.5  # share of the training windows that begin with BOS
WARM_UP = 0.02  # share of the budget
EMA_DECAY = 0.999
CHUNK = 1 << 16  # characters encoded as one string; a word cut in two so seldom does no harm
LOG_EVERY = 500

LossFunction = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]


def read_chunks(path: Path) -> list[str]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    return [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]


def train_tokenizer(texts: list[list[str]], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((chunk for text in texts for chunk in text), trainer)
    if (found := tokenizer.get_vocab_size()) != vocab:
        raise SystemExit(f"--vocab {vocab}: the text yields {found} tokens; use more text")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[list[str]]) -> torch.Tensor:
    """All texts as one int64 tensor, BOS in front of each."""
    parts = []
    for text in texts:
        parts.append(torch.tensor([0]))
        for first in range(0, len(text), 32):  # bounds the memory held by encodings
            batch = tokenizer.encode_batch(text[first : first + 32])
            parts.extend(torch.tensor(encoding.ids, dtype=torch.int64) for encoding in batch)
    return torch.cat(parts)


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(options.device, torch.float32).train()


def draw_windows(tokens: torch.Tensor, batch: int, seq_len: int) -> torch.Tensor:
    starts = torch.randint(len(tokens) - seq_len, (batch, 1), device=tokens.device)
    windows = tokens[starts + torch.arange(seq_len + 1, device=tokens.device)]  # [batch, seq + 1]
    windows[:, 0].masked_fill_(torch.rand(batch, device=tokens.device) < BOS_WINDOWS, 0)
    return windows


def plain_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the tokens after the first of each window [batch, seq + 1]."""
    device = windows.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def compiled_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> LossFunction:
    """plain_loss under torch.compile and CUDA graphs if that works and agrees, else as it is."""

    def measure(loss: LossFunction) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        value = loss(model, windows)
        value.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return torch.stack([value.detach(), torch.stack(norms).norm()]).cpu()

    try:
        expected = measure(plain_loss)
        compiled = torch.compile(plain_loss, mode="reduce-overhead", dynamic=False)
        for _ in range(3):  # compiles, records the graphs, replays them
            torch.testing.assert_close(measure(compiled), expected, rtol=0.02, atol=0.0)
    except Exception as error:  # whatever the compiler lacks here, training goes on without it
        print(f"torch.compile failed, running eagerly: {type(error).__name__}: {error}"[:600])
        return plain_loss
    return compiled


def train(model: LlamaForCausalLM, tokens: torch.Tensor, options: argparse.Namespace) -> None:
    """Train in place; the model ends with the moving average of its weights."""
    first = draw_windows(tokens, options.batch, options.seq_len)
    loss_of = compiled_loss(model, first) if options.compile else plain_loss
    params = list(model.parameters())
    averages = [p.detach().clone() for p in params]
    norms = {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}
    matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1}
    fused = tokens.device.type == "cuda"
    optimizer = torch.optim.AdamW([matrices, norms], options.lr, betas=(0.9, 0.95), fused=fused)
    total = torch.zeros((), device=tokens.device)
    begin = time.perf_counter()
    step, seconds, done = 0, 0.0, 0.0  # done: the share of the budget that is spent
    while done < 1.0:
        cosine = 0.5 * (1.0 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine * min(1.0, done / WARM_UP)
        optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(model, draw_windows(tokens, options.batch, options.seq_len))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        total += loss.detach()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))  # a short run must forget its start
        with torch.no_grad():
            for average, p in zip(averages, params, strict=True):
                average.lerp_(p, 1.0 - decay)
        step += 1
        if step % LOG_EVERY == 0:
            print(f"step {step}: loss {total.item() / LOG_EVERY:.4f}, {seconds:.0f} s", flush=True)
            total.zero_()
        seconds = time.perf_counter() - begin
        done = step / options.steps if options.steps else seconds / (60.0 * options.minutes)
    print(f"{step} steps in {seconds:.0f} s, last loss {loss.item():.4f}")
    with torch.no_grad():
        for average, p in zip(averages, params, strict=True):
            p.copy_(average)


@torch.no_grad()
def measure_held_out(out: Path, tokens: torch.Tensor, byte_lengths: torch.Tensor, seq: int) -> str:
    """What the folder scores over windows that do not overlap, and a sample of its text."""
    model = AutoModelForCausalLM.from_pretrained(out).to(tokens.device, torch.float32).eval()
    windows = tokens.unfold(0, seq + 1, seq)  # [count, seq + 1]
    targets = windows[:, 1:]
    nats = sum(plain_loss(model, part).item() * part[:, 1:].numel() for part in windows.split(16))
    bits_per_byte = nats / math.log(2.0) / byte_lengths[targets.cpu()].sum().item()
    prompt = torch.zeros((1, 1), dtype=torch.int64, device=tokens.device)
    sampling = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 60, "pad_token_id": 0}
    sample = model.generate(prompt, attention_mask=prompt + 1, **sampling)[0, 1:].tolist()
    scores = f"perplexity {math.exp(nats / targets.numel()):.3f}, {bits_per_byte:.4f} bits per byte"
    return f"held out: {scores}\nsample: {AutoTokenizer.from_pretrained(out).decode(sample)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Llama and its tokenizer.")
    parser.add_argument("text", nargs="+", type=Path, help="plain text, or .xz of it, in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    sizes = {"hidden": 192, "layers": 4, "intermediate": 384, "heads": 6, "kv-heads": 2}
    for name, value in (sizes | {"vocab": 1024, "seed": 0, "seq-len": 512, "batch": 64}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--minutes", type=float, default=3.0, help="time of training; default 3")
    parser.add_argument("--steps", type=int, help="steps of training, instead of --minutes")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest rate; default 0.003")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: cuda if any")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    begin = time.perf_counter()
    texts = [read_chunks(path) for path in options.text]
    tokenizer = train_tokenizer(texts, options.vocab)
    trained = time.perf_counter()
    tokens = encode(tokenizer, texts).to(options.device)
    print(f"tokenizer {trained - begin:.1f} s, encoding {time.perf_counter() - trained:.1f} s")
    held_out = len(tokens) // 100
    if held_out <= options.seq_len:
        raise SystemExit(f"{held_out} held-out tokens; needed: more than --seq-len; use more text")
    model = make_model(options)
    print(f"{len(tokens)} tokens, {model.num_parameters()} parameters", flush=True)
    train(model, tokens[:-held_out], options)

    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)  # the library leaves it to its owner alone
    tokenizer.save(str(options.out / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS}
    limits = {"clean_up_tokenization_spaces": False, "model_max_length": MAX_POSITIONS}
    (options.out / "tokenizer_config.json").write_text(json.dumps(named | limits, indent=2) + "\n")
    lengths = torch.zeros(options.vocab, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token) if index else 0  # one character stands for one byte
    print(measure_held_out(options.out, tokens[-held_out:], lengths, options.seq_len))


if __name__ == "__main__":
    main()
