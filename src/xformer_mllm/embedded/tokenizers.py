"""The two tokenizers of an embedded world: one small WordPiece vocabulary, in BERT and in OPT format."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from xformer_mllm.embedded.scenes import SCENES, WRITTEN, World
from xformer_mllm.embedded.world import SPLITS

# Words of easy-VQA and of questions in general, added to the vocabularies so that each is one token.
OTHER_WORDS = (
    *(
        "an",
        "answer",
        "any",
        "are",
        "black",
        "brown",
        "color",
        "contain",
        "contains",
        "describe",
        "do",
        "does",
        "five",
    ),
    *("four", "gray", "how", "image", "in", "is", "it", "many", "no", "not", "object", "of", "on", "one", "orange"),
    *("other", "pink", "picture", "present", "question", "rectangle", "several", "shape", "shapes", "six", "some"),
    *("star", "the", "this", "three", "two", "what", "where", "which", "white", "with", "yes"),
)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'\"()-"


def world_words(world: World = SCENES) -> list[str]:
    """Every word of the world's texts and of OTHER_WORDS, sorted."""
    texts = [*OTHER_WORDS]
    for scene in (world.draw(split, index) for split in SPLITS for index in range(1000)):
        texts += [world.caption(scene, WRITTEN), world.description(scene)]
        texts += [f"{asked.question} {asked.answer}" for asked in world.ask(scene, 4)]
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    return sorted({word for text in texts for word, _ in split(text.lower())} | {str(n) for n in range(10)})


def _word_piece(world: World, specials: list[str]) -> Tokenizer:
    """Lower-case WordPiece over the world's words; other words split into characters, other characters are unknown."""
    pieces = [*specials, *world_words(world), *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    unknown = next(token for token in specials if "unk" in token.lower())
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def qformer_tokenizer(world: World = SCENES) -> PreTrainedTokenizerFast:
    """The Q-Former's tokenizer: [CLS] text [SEP] as in BERT, and [DEC] to start generated text as in LAVIS."""
    tokenizer = _word_piece(world, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[DEC]",
        model_max_length=64,
        clean_up_tokenization_spaces=True,
    )


def lm_tokenizer(world: World = SCENES) -> PreTrainedTokenizerFast:
    """The language model's tokenizer: </s> first, as in OPT; <end> ends an answer; <image> marks the soft prompt."""
    tokenizer = _word_piece(world, ["<s>", "<pad>", "</s>", "<unk>", "<end>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="</s>",
        eos_token="<end>",
        additional_special_tokens=["<image>"],
        model_max_length=256,
        clean_up_tokenization_spaces=True,
    )
