"""`xformer estimate RECIPE`: what a training run costs, before any GPU is asked for.

In the order of reading:

    run         the command: its settings, the recipe, what is asked of each GPU, the variants side by side
    sizes       parameters and stacks, read off the model on the meta device
    operations  the cost of an operation, by its shapes
    costs       those of the parts of a pass, and from them memory and time on a GPU
    tables      what is printed

Three things are told apart by how they are known:

    parameters     counted on the model itself, built on the meta device: exact
    FLOPs, bytes   arithmetic on the shapes, part by part: FLOPs of the matrix products are exact, bytes kept for the
                   backward pass within a per cent of what autograd saves (tests/test_estimate.py holds both)
    seconds        an assumption: matrix products reach a share of the GPU's peak (--utilisation), and what is kept for the
                   backward pass is written and read at the memory's bandwidth

All are those of bf16 autocast on a GPU: frozen parts in bf16, trained ones in fp32, layer norms in fp32, attention by a
kernel that keeps no map. A cost is that of one image unless it says otherwise; MB and GB are 10^6 and 10^9 bytes.

`D` width, `Q` queries, `T` text tokens, `N` CLIP tokens, `L` tokens of M.
"""
