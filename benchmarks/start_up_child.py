"""A fresh process that gets somewhere and says when: `python benchmarks/start_up_child.py CONTESTANT GOAL ARGUMENT`.

Nothing is imported before the goal asks for it. Prints the time of a clock that all processes share (`time.monotonic`).
The goal `step` needs WORKLOAD_JSON, the goal `token` two lines: the device, and a model's directory, which the goal
`write` of ours makes.
"""

from __future__ import annotations

import sys
import time

PROMPT = "hi, how are you?"


def ours_import(_: str) -> None:
    """The package."""
    import ssl_jax

    assert ssl_jax.__version__


def ours_step(workload: str) -> None:
    """A run's first step."""
    from train_ours import Training
    from workload import Workload

    from ssl_jax import compilation_cache

    compilation_cache.enable()
    Training(Workload.model_validate_json(workload)).take(1)


def ours_token(arguments: str) -> None:
    """A model from its directory, and a reply of one token; JAX knows the device from the environment."""
    import ssl_jax
    from ssl_jax import compilation_cache

    compilation_cache.enable()
    _, directory = arguments.split("\n")
    ssl_jax.load(directory).generate_response(PROMPT, max_new_tokens=1, top_k=50)


def ours_write(arguments: str) -> None:
    """A Hugging Face directory of a model with fresh weights; `arguments` are WORKLOAD_JSON and the directory."""
    from pathlib import Path

    import jax
    from train_ours import make_config
    from workload import Workload

    from ssl_jax import huggingface, model
    from ssl_jax.data.tokenizer import DialogueTokenizer

    described, directory = arguments.split("\n")
    workload = Workload.model_validate_json(described)
    tokenizer = DialogueTokenizer.fit([PROMPT], workload.vocab_size)
    shape = model.GPT2.from_config(make_config(workload).model, tokenizer.vocab_size)
    huggingface.write(
        Path(directory),
        shape,
        model.init(shape, jax.random.key(0)),
        end_ids=tokenizer.end_ids,
        end_of_text_id=tokenizer.end_of_text_id,
        pad_id=tokenizer.pad_id,
        add_files=tokenizer.save,
    )


def huggingface_import(_: str) -> None:
    """The package."""
    import transformers

    assert transformers.__version__


def huggingface_step(workload: str) -> None:
    """The Trainer's first step."""
    import tempfile

    from train_huggingface import make_trainer
    from transformers import TrainerCallback
    from workload import Workload

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            control.should_training_stop = True

    with tempfile.TemporaryDirectory(prefix="start_up_") as folder:
        make_trainer(Workload.model_validate_json(workload), folder, Stops()).train()


def huggingface_token(arguments: str) -> None:
    """A model from its directory, and a reply of one token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, directory = arguments.split("\n")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    as_on_a_gpu = {} if device == "cpu" else {"dtype": "bfloat16", "device_map": device}
    network = AutoModelForCausalLM.from_pretrained(directory, **as_on_a_gpu)
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    tokenizer.decode(network.generate(**tokens, max_new_tokens=1, do_sample=True, top_k=50)[0])


GOALS = {
    ("ssl_jax", "import"): ours_import,
    ("ssl_jax", "step"): ours_step,
    ("ssl_jax", "token"): ours_token,
    ("ssl_jax", "write"): ours_write,
    ("huggingface", "import"): huggingface_import,
    ("huggingface", "step"): huggingface_step,
    ("huggingface", "token"): huggingface_token,
}

if __name__ == "__main__":
    GOALS[sys.argv[1], sys.argv[2]](sys.argv[3])
    print(time.monotonic())
