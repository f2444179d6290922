"""The web page: ask X-Former and its baseline the same question, and look at what they see."""

import hmac
import os
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is reported to others

import gradio as gr
import torch
from fastapi import FastAPI
from PIL import Image

from xformer_mllm import defaults
from xformer_mllm.evaluate.query_analysis import attention_of, overlay, second_tokens, to_maps
from xformer_mllm.inference import alternatives, bf16_autocast, generate_by_qformer, readable
from xformer_mllm.report.reconstructions import panel_grid, reconstructions, to_panels
from xformer_mllm.report.wording import display_name
from xformer_mllm.serve.api import ApiSettings
from xformer_mllm.serve.engine import Engine, FullError, Loaded
from xformer_mllm.serve.images import decode

ALTERNATIVES = 5
ANSWER_TOKENS, CAPTION_TOKENS = 16, 30
QUESTIONS = (
    "What texture does the yellow triangle have?",
    "How many objects are there in the image?",
    "Is there a striped object?",
)
TITLE = "X-Former"
INTRODUCTION = (
    "# X-Former\n"
    "A Q-Former reads CLIP's tokens of an image, which keep its global meaning. X-Former's dual cross-attention adds "
    "a MAE's tokens, which keep local detail. Choose an image, and compare the answers."
)
SCENES_ONLY = (
    "These models were trained on drawn scenes of 48 x 48 pixels, such as the examples. Do not expect sensible answers "
    "about photographs."
)
FONT, FONT_MONO = (
    ("system-ui", "sans-serif"),
    ("ui-monospace", "monospace"),
)  # the theme's own would be fetched from Google
# The theme's own grey and blue are too pale to read for some.
CONTRAST = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "color_accent": "*primary_600",
}
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#maps, #panels { padding-top: 2.5rem; }  /* below the label and the buttons */
.dark { --color-accent: var(--primary-400); }
"""


def mount_page(app: FastAPI, engine: Engine, settings: ApiSettings, examples: Sequence[Path] = ()) -> FastAPI:
    """Serve the page at /; with an API key it asks for a password, which is the key."""

    def signed_in(user: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), str(settings.api_key).encode())

    return gr.mount_gradio_app(
        app,
        build_page(engine, settings, examples),
        path="/",
        footer_links=[],
        auth=None if settings.api_key is None else signed_in,
        auth_message="The password is the server's API key; any user name.",
        max_file_size=settings.max_body,
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="blue", font=FONT, font_mono=FONT_MONO).set(**CONTRAST),
        css=CSS,
    )


def build_page(engine: Engine, settings: ApiSettings, examples: Sequence[Path] = ()) -> gr.Blocks:
    """The page's components and what they do."""
    page = _Page(engine, settings)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(INTRODUCTION)
        if page.shipped:
            gr.Markdown(SCENES_ONLY)
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    type="filepath",
                    format="png",
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=320,
                    elem_id="image",
                    alt_text="The image that is asked about",
                    value=str(examples[0]) if examples else None,
                )
                if examples:
                    names = [f"Image {number}" for number in range(1, len(examples) + 1)]
                    gr.Examples(
                        [[str(path)] for path in examples], [image], label="Example images", example_labels=names
                    )
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("Ask"):
                    question = gr.Textbox(
                        label="Question",
                        value=QUESTIONS[0] if page.shipped else "",
                        placeholder="What is it?",
                        max_lines=2,
                    )
                    if page.shipped:
                        gr.Examples([[text] for text in QUESTIONS], [question], label="Example questions")
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    with gr.Row():
                        answers = [
                            gr.Label(label=page.title(name), num_top_classes=ALTERNATIVES, elem_id=f"answer-{place}")
                            for place, name in enumerate(settings.answering)
                        ]
                    gr.Markdown("The most probable answers, by beam search, with their probabilities.")
                    if settings.embedding is not None:
                        describe = gr.Button("Describe", elem_id="describe")
                        caption = gr.Textbox(label="Caption, by stage 1", interactive=False, elem_id="caption")
                        describe.click(page.describe, [image], [caption])
                with gr.Tab("Attention"):
                    gr.Markdown(
                        "The queries' attention over CLIP's tokens, and over the MAE's after they have read the queries "
                        "(M'), averaged over heads and layers. Queries that read the question are given it."
                    )
                    look = gr.Button("Show attention", variant="primary", elem_id="look")
                    maps = gr.Image(
                        label="Attention of the queries",
                        interactive=False,
                        format="png",
                        elem_id="maps",
                        alt_text="Heat maps of the queries' attention, a row for each model and kind of tokens",
                    )
                if page.reconstructs:
                    with gr.Tab("Reconstruct"):
                        gr.Markdown(
                            "Patches are hidden from the MAE, and its frozen decoder reconstructs them: from M alone, and "
                            "from M', which has read the queries and through them CLIP's tokens of the whole image."
                        )
                        share = gr.Slider(0.1, 0.9, value=0.5, step=0.05, label="Share of patches that are hidden")
                        seed = gr.Slider(0, 9, value=0, step=1, label="Which patches")
                        rebuild = gr.Button("Reconstruct", variant="primary", elem_id="rebuild")
                        panels = gr.Image(
                            label="Reconstruction",
                            interactive=False,
                            format="png",
                            elem_id="panels",
                            alt_text="The image, the visible patches, and the reconstructions by MAE and X-Former",
                        )
                        rebuild.click(page.rebuild, [image, share, seed], [panels])
        for trigger in (ask.click, question.submit):
            trigger(page.ask, [image, question], answers)
        look.click(page.look, [image, question], [maps])
    return blocks


class _Page:
    """What the buttons do. Models are used on the engine's thread, in turn with the API's requests."""

    def __init__(self, engine: Engine, settings: ApiSettings):
        self.engine, self.settings = engine, settings
        stage1 = engine.models.get(settings.embedding or "")
        self.reconstructs = stage1 is not None and stage1.model.xformer.mae_decoder is not None
        self.shipped = Path(engine.models[settings.answering[0]].model.name_or_path) == defaults.shipped_model()

    def title(self, name: str) -> str:
        """A model's name for people."""
        return display_name(name)

    def ask(self, path: str | None, question: str) -> list[dict[str, float]]:
        """The alternatives of every model."""
        image = self._image(path)
        if not question.strip():
            raise gr.Error("Type a question, or press Describe.")

        def answer(name: str, loaded: Loaded, pixels: torch.Tensor) -> dict[str, float]:
            found: dict[str, float] = {}
            options = {"features": self.engine.features(name, pixels), "max_new_tokens": ANSWER_TOKENS}
            for text, probability in alternatives(
                loaded.model, loaded.processor, loaded.prompt(question.strip()), ALTERNATIVES, **options
            ):
                found[readable(text)] = found.get(readable(text), 0.0) + (probability or 0.0)
            return found

        results = [self._run(answer, name, image) for name in self.settings.answering]
        return results if len(results) > 1 else results[0]  # type: ignore[return-value]  # Gradio's convention

    def describe(self, path: str | None) -> str:
        """Stage 1's caption."""
        image = self._image(path)

        def write(name: str, loaded: Loaded, pixels: torch.Tensor) -> str:
            batch = pixels[None].to(loaded.model.device)
            (caption,) = generate_by_qformer(loaded.model, loaded.processor, batch, CAPTION_TOKENS)
            return readable(caption.text)

        return self._run(write, str(self.settings.embedding), image)

    def look(self, path: str | None, question: str) -> Image.Image:
        """Heat maps of every model that answers."""
        image = self._image(path)

        def attend(name: str, loaded: Loaded, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            model, texts = loaded.model, {}
            if model.config.instruction_aware:
                texts = loaded.processor.qformer_inputs([loaded.prompt(question.strip())])
                texts = {key: value.to(model.device) for key, value in texts.items()}
            features = self.engine.features(name, pixels)
            with torch.inference_mode(), bf16_autocast(model.device):
                output = model.get_image_features(features=features, **texts, output_attentions=True).xformer_output
            kinds = attention_of(output, second_tokens(model.config))
            return {tokens: to_maps(attention).cpu() for tokens, attention in kinds.items()}

        return overlay(image, {name: self._run(attend, name, image) for name in self.settings.answering}, 0)

    def rebuild(self, path: str | None, share: float, seed: float) -> Image.Image:
        """The hidden patches, by MAE and by X-Former."""
        image = self._image(path)

        def draw(name: str, loaded: Loaded, pixels: torch.Tensor) -> Image.Image:
            with torch.inference_mode():
                images = reconstructions(loaded.model, pixels[None].to(loaded.model.device), share, int(seed))
            images.pop("hidden")
            return panel_grid(to_panels(images))

        return self._run(draw, str(self.settings.embedding), image)

    def _image(self, path: str | None) -> Image.Image:
        if path is None:
            raise gr.Error("Choose an image first.")
        try:
            return decode(Path(path).read_bytes(), self.settings.images.max_pixels)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error

    def _run(self, work: Callable[[str, Loaded, torch.Tensor], Any], name: str, image: Image.Image) -> Any:
        """Call `work(name, model, pixels)` on the engine's thread."""
        loaded = self.engine.models[name]
        pixels = loaded.pixels(image)
        try:
            return self.engine.run(lambda: work(name, loaded, pixels)).result(self.settings.seconds)
        except FullError as error:
            raise gr.Error("The server is busy. Try again in a moment.") from error
        except LateError as error:
            raise gr.Error("The server took too long.") from error
        except ValueError as error:
            raise gr.Error(str(error)) from error
