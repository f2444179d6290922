"""`xformer export`: a model -> one folder with all that it needs, for the hub and for who has transformers alone.

In the order of reading:

    settings  what can be asked for
    run       the command: its steps, and what it prints; the folder appears whole or not at all
    source    the model as it is: its kind, its weights, its processor
    facts     all that is known of it, with what is beside it: the runs that made it, its evaluations
    folder    weights, settings and code, as they are written
    card      README.md: how to use it, what is in it, scores, data, licence, citation
"""
