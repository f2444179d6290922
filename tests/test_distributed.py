"""Two real processes give the losses and the gradients of one process with the joint batch."""

import os

import torch
from conftest import randomise, tiny_config
from torch import multiprocessing

from xformer_mllm import XFormerForPreTraining
from xformer_mllm.model.distributed import equally_long, gather, share

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
    losses = torch.stack([output.itc_loss, output.itm_loss, output.itg_loss, output.reconstruction_loss]).detach()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_of_two(rank, inputs, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mine = slice(2 * rank, 2 * rank + 2)
    negatives = tuple(index[mine] for index in inputs["negatives"])
    local = {name: value[mine] for name, value in inputs.items() if name != "negatives"}
    longest = int(local["qformer_attention_mask"].sum(1).max())
    local |= {name: local[name][:, :longest] for name in ("qformer_input_ids", "qformer_attention_mask")}
    losses, grads = gradients({**local, "negatives": negatives})
    grads = {name: gradient.contiguous() for name, gradient in grads.items()}
    for value in (losses, *grads.values()):  # as DDP does
        torch.distributed.all_reduce(value)
        value /= WORLD
    found = torch.tensor([[5, 6, 9][: 2 + rank], [7, 8, 9][: 2 + rank]])
    ids, padding = equally_long(found, found != 9)
    result = {
        "longest": longest,
        "ids": ids,
        "padding": padding,
        "share": share(found < 9),
        "losses": losses,
        "grads": grads,
    }
    torch.save(result, f"{folder}/result-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(texts, images, tmp_path):
    """Though their texts are of different lengths, and padded to different lengths."""
    ids, mask = texts
    mask[2, 6:] = 0
    inputs = batch((ids * mask, mask), images)
    losses, grads = gradients(inputs)
    multiprocessing.spawn(one_of_two, args=(inputs, str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert (first["longest"], second["longest"]) == (7, 6)
    torch.testing.assert_close(first["losses"], losses, atol=1e-5, rtol=1e-4)
    assert first["grads"].keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(
            first["grads"][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    # What stands at a padded place, and how far a process padded, makes no difference between equal texts.
    assert first["ids"].tolist() == [[5, 6, 0], [7, 8, 0]] == second["ids"].tolist()
    assert first["padding"].tolist() == [[True, True, False]] * 2 == second["padding"].tolist()
    assert first["share"] == second["share"] == 1


def test_one_process_needs_no_group():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert gather(tensor) is tensor
    assert share(torch.ones(3)) == 1
    ids, mask = torch.tensor([[5, 9]]), torch.tensor([[1, 0]])
    assert equally_long(ids, mask) == (ids, mask)
