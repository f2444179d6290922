"""`xformer estimate RECIPE`: what a training run costs, before it starts.

Modules, in reading order:

    estimation  the command: settings, recipe, the work of each GPU, the variants
    sizes       parameters and stacks, read from the model on the meta device
    costs       operations, the parts of a pass, and from them memory and time on a GPU
    tables      the printed tables

Accuracy of the numbers:

    parameters     counted on the model itself, built on the meta device: exact
    FLOPs, bytes   computed from the shapes, part by part: FLOPs of the matrix products are exact, bytes kept for the
                   backward pass within one per cent of what autograd saves (tests/test_estimate.py checks both)
    seconds        assumed: matrix products reach a share of the GPU's peak (--utilisation), and what is kept for the
                   backward pass is written and read at the memory bandwidth

Precision: bf16 autocast on a GPU, with frozen parts in bf16, trained parts and layer norms in fp32, and an attention
kernel that keeps no map. A cost is per image unless stated otherwise; MB and GB are 10^6 and 10^9 bytes.

`D` width, `Q` queries, `T` text tokens, `N` CLIP tokens, `L` tokens of M.
"""
