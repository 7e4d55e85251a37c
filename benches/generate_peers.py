"""Greedy decoding with llama.cpp or transformers on the CPU, for comparison with `monteclora bench generate`.

Usage: generate_peers.py llama.cpp FILE.gguf | transformers MODEL_DIR  [--batch 1] [--prompt 32] [--tokens 128] [--runs 3]
Needs llama-cpp-python, or torch and transformers. Texts are random tokens and have no end; the first token of each text comes
from the prompt's pass and is not in the time, as in `bench generate`. Prints one line of JSON; the fastest run counts.
`generate_peers.py f32 FILE.gguf OUT.gguf` writes the values of a quantised file in float32.
"""
import argparse
import json
import os
import random
import time


def prompts_of(batch, length, vocab):
    source = random.Random(0)
    return [[source.randrange(vocab) for _ in range(length)] for _ in range(batch)]


def llama_cpp(args):
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), llama_cpp.llama_model_default_params())
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = args.batch * (args.prompt + args.tokens + 8)
    options.n_seq_max = args.batch
    options.n_batch = options.n_ubatch = max(512, args.batch * args.prompt)
    options.n_threads = options.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, options)
    prompts = prompts_of(args.batch, args.prompt, vocab)

    def decode(tokens):
        """`tokens`: (token, position, text, whether its logits are wanted); the most likely next token of each wanted."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for idx, (token, position, text, wanted) in enumerate(tokens):
            batch.token[idx], batch.pos[idx] = token, position
            batch.n_seq_id[idx], batch.seq_id[idx][0], batch.logits[idx] = 1, text, wanted
        assert llama_cpp.llama_decode(context, batch) == 0
        found = []
        for idx, (*_, wanted) in enumerate(tokens):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(context, idx)
                found.append(int(np.ctypeslib.as_array(logits, shape=(vocab,)).argmax()))
        llama_cpp.llama_batch_free(batch)
        return found

    def run():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [
            (token, position, text, position == args.prompt - 1)
            for text, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        newest = decode(rows)
        begin = time.perf_counter()
        for step in range(args.tokens - 1):
            newest = decode([(token, args.prompt + step, text, True) for text, token in enumerate(newest)])
        return time.perf_counter() - begin

    # What the library calls must live as long as the runs.
    run.kept = silent
    return run


def transformers(args):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = torch.tensor(prompts_of(args.batch, args.prompt, model.config.vocab_size))

    @torch.inference_mode()
    def run():
        found = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        newest = found.logits[:, -1].argmax(-1, keepdim=True)
        begin = time.perf_counter()
        for _ in range(args.tokens - 1):
            found = model(input_ids=newest, past_key_values=found.past_key_values, use_cache=True)
            newest = found.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - begin

    return run


def f32(args):
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = 0, True, args.threads
    assert llama_cpp.llama_model_quantize(args.model.encode(), args.out.encode(), options) == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=["llama.cpp", "transformers", "f32"])
    parser.add_argument("model")
    parser.add_argument("out", nargs="?")
    for name, default in [("batch", 1), ("prompt", 32), ("tokens", 128), ("runs", 3), ("threads", os.cpu_count())]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.peer == "f32":
        return f32(args)
    run = {"llama.cpp": llama_cpp, "transformers": transformers}[args.peer](args)
    seconds = min(run() for _ in range(args.runs))
    figures = {"batch": args.batch, "prompt": args.prompt, "tokens": args.tokens, "threads": args.threads}
    print(json.dumps({"peer": args.peer, **figures, "tokens_per_second": args.batch * (args.tokens - 1) / seconds}))


main()
