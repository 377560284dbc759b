"""Data: sources -> process -> pack -> lanes -> loader. Importing a name here imports only the module that defines it."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "dataset": ["Dataset", "Draws", "Item", "Visit"],
        "sources.json_lines": ["JsonLines"],
        "sources.web_dataset": ["WebDataset"],
        "tokenizer": ["TextTokenizer"],
        "processors.tokenize": ["Tokenize"],
        "processors.chat": ["Chat"],
        "processors.chat_images": ["ChatImages"],
        "processors.prompt_response": ["PromptResponse"],
        "processors.fill_in_the_middle": ["FillInTheMiddle"],
        "processors.pixels": ["Pixels"],
        "processors.class_image": ["ClassImage"],
        "processors.captioned_image": ["CaptionedImage"],
        "processors.class_latent": ["ClassLatent"],
        "processors.video": ["ClassVideo", "Video"],
        "processors.audio": ["Audio"],
        "augmentations": ["ColorJitter", "RandAugment", "RandomResizedCrop"],
        "packing": ["ConcatPack", "Stack", "Piece"],
        "lanes": ["Lane", "Order"],
        "loader": ["Loader", "EvalLoader", "Step"],
        "paths": ["DataMissing"],
    },
)
