"""Data: sources -> process -> pack -> lanes -> loader. Importing a name here imports only the module that defines it."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "dataset": ["Dataset", "Item", "Visit"],
        "sources.chat_json": ["ChatJson"],
        "sources.csv_file": ["Csv"],
        "sources.hf_dataset": ["HFDataset"],
        "sources.image_folder": ["ImageFolder"],
        "sources.json_lines": ["JsonLines"],
        "sources.json_lines_stream": ["JsonLinesStream"],
        "sources.megatron": ["Megatron", "MegatronWriter"],
        "sources.parquet_stream": ["ParquetStream"],
        "sources.web_dataset": ["WebDataset"],
        "sources.web_dataset_stream": ["WebDatasetStream"],
        "processors.token_ids": ["TokenIds"],
        "processors.tokenize": ["Tokenize"],
        "processors.class_image": ["ClassImage"],
        "processors.class_latent": ["ClassLatent"],
        "mixing": ["Mix"],
        "packing": ["ConcatPack", "FitPack", "OnePerRow", "Cost", "Stack", "Piece"],
        "lanes": ["Lane"],
        "order": ["Order"],
        "loader": ["Loader", "EvalLoader", "Step"],
        "paths": ["DataMissing"],
    },
)
