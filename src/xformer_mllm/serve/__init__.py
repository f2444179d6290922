"""`xformer serve`: a web page and an OpenAI-compatible API on `inference.py`, in one process.

HTTP ──> limits (size, time) ──> api (OpenAI's protocol) ──┐
                                 page (Gradio) ────────────┴> engine (one thread with the models, batches)
"""
