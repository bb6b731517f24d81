"""Adapters read from and written to PEFT's folder format. Each kind of adapter has a module of its own here.

Such a module has PEFT_TYPE and these functions:

- `attach_to(model, config, specs, folder)` attaches adapters with a folder's settings, values still to be read;
- `peft_tensors(model)` lists the tensors that a folder has for a model's adapters;
- `adapter_config_fields(model)` gives their fields of adapter_config.json;
- `merge_blocks(base, config, source)` says how the base's tensors are merged with a folder while they are read; a kind
  without it cannot be merged.

`keys` reads the keys of all dialects, `base` finds what a folder changes in its base, and `reading` and `writing` put
both together with a kind's own part.

Optional are `plain_model(model)`, the model with its adapters in a form that PEFT can load, for adapters that have
another; `normalize(config, source, base)`, one form of a folder for kinds that have two; and `optional_keys(config)`,
the tensors that a folder may leave out.
"""

from jaxft.checkpoint.peft.reading import PeftFolder as PeftFolder
from jaxft.checkpoint.peft.reading import attach_folder as attach_folder
from jaxft.checkpoint.peft.reading import attach_structure as attach_structure
from jaxft.checkpoint.peft.reading import open_adapter as open_adapter
from jaxft.checkpoint.peft.reading import read_adapter as read_adapter
from jaxft.checkpoint.peft.writing import check_writable as check_writable
from jaxft.checkpoint.peft.writing import write_adapter as write_adapter
