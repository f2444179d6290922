"""Two real processes give the losses and the gradients of one process with the joint batch."""

import os

import torch
from conftest import randomise, tiny_config
from torch import multiprocessing

from xformer_mllm import XFormerForPreTraining
from xformer_mllm.model.distributed import gather

WORLD = 2


def batch(texts, images):
    """Everything random is handed in: noise, and negatives as indices over all processes."""
    ids, mask = texts
    return {
        "pixel_values": images,
        "qformer_input_ids": ids,
        "qformer_attention_mask": mask,
        "noise": torch.linspace(0, 1, 64).reshape(4, 16).sin(),
        "negatives": (torch.tensor([2, 3, 0, 1]), torch.tensor([1, 2, 3, 0])),
    }


def gradients(inputs):
    torch.manual_seed(0)
    model = randomise(XFormerForPreTraining(tiny_config()))
    model.freeze()
    output = model(**inputs)
    output.loss.backward()
    losses = torch.stack([output.itc_loss, output.itm_loss, output.reconstruction_loss]).detach()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_of_two(rank, inputs, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mine = slice(2 * rank, 2 * rank + 2)
    negatives = tuple(index[mine] for index in inputs["negatives"])
    local = {name: value[mine] for name, value in inputs.items() if name != "negatives"}
    losses, grads = gradients({**local, "negatives": negatives})
    grads = {name: gradient.contiguous() for name, gradient in grads.items()}
    for value in (losses, *grads.values()):  # as DDP does
        torch.distributed.all_reduce(value)
        value /= WORLD
    if rank == 0:
        torch.save({"losses": losses, "grads": grads}, f"{folder}/result.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(texts, images, tmp_path):
    ids, mask = texts
    inputs = batch((ids, torch.ones_like(mask)), images)  # equal lengths: ITG's mean is then the mean of means
    losses, grads = gradients(inputs)
    multiprocessing.spawn(one_of_two, args=(inputs, str(tmp_path)), nprocs=WORLD)
    theirs = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(theirs["losses"], losses, atol=1e-5, rtol=1e-4)
    assert theirs["grads"].keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(
            theirs["grads"][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_one_process_needs_no_group():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert gather(tensor) is tensor
