"""Read, write and verify what is on disk: run records, model folders, weight files.

`record` reads and writes vlft.json. `files` holds file names and maps tensor names, `adapter` reads adapter folders.
`folders` finds models, runs and adapters, and `door` refuses bases that cannot be used. `lineage` finds the base of an
adapter. `plain` opens a base without transformers. `weights` computes fingerprints and loads strictly, and `rewrite`
writes a model with some tensors changed. `quantised` reads how a run's base was quantised, and `quantised_files` reads
models that are stored so. Nothing here trains or merges. torch, peft and the hub client are imported where used.
"""

from vlft.checkpoint.adapter import PREFIX, Adapter, read_adapter
from vlft.checkpoint.door import check_processor
from vlft.checkpoint.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    family_of,
    module_name,
)
from vlft.checkpoint.folders import Located, find_adapter_or_model, resolve_complete, resolve_model, snapshot_revision
from vlft.checkpoint.lineage import PICTURE_FILES, check_lineage, find_base, open_processor, processor_files
from vlft.checkpoint.plain import PlainProcessor, open_plain
from vlft.checkpoint.quantised import (
    check_quantised_run,
    check_sharing,
    computing_dtype_of,
    quantisation_of,
    quantisation_to_answer,
    require_bitsandbytes,
)
from vlft.checkpoint.record import RECORD, RunRecord, library_versions, read_record, write_record
from vlft.checkpoint.rewrite import copy_configs, remark_on_carried, rewrite, write_trained
from vlft.checkpoint.weights import (
    attach_adapter,
    base_fingerprint,
    load_adapter_strict,
    load_weights_strict,
)
from vlft.families import is_tied
from vlft.model_files import INDEX, read_json, some_of, tensor_index

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "INDEX",
    "PICTURE_FILES",
    "PREFIX",
    "RECORD",
    "Adapter",
    "Located",
    "PlainProcessor",
    "RunRecord",
    "attach_adapter",
    "base_fingerprint",
    "check_lineage",
    "check_processor",
    "check_quantised_run",
    "check_sharing",
    "computing_dtype_of",
    "copy_configs",
    "family_of",
    "find_adapter_or_model",
    "find_base",
    "is_tied",
    "library_versions",
    "load_adapter_strict",
    "load_weights_strict",
    "module_name",
    "open_plain",
    "open_processor",
    "processor_files",
    "quantisation_of",
    "quantisation_to_answer",
    "read_adapter",
    "read_json",
    "read_record",
    "remark_on_carried",
    "require_bitsandbytes",
    "resolve_complete",
    "resolve_model",
    "rewrite",
    "snapshot_revision",
    "some_of",
    "tensor_index",
    "write_record",
    "write_trained",
]
