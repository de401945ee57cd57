"""Official checkpoints of TARFlow (ml-tarflow), iTARFlow (ml-itarflow), STARFlow (ml-starflow), read and written."""

from itarflow.convert.names import name_map, official_name
from itarflow.convert.official import export_official, load_official, official_state, our_weights
from itarflow.convert.public_files import PUBLIC_FILES, PublicFile

__all__ = [
    "PUBLIC_FILES",
    "PublicFile",
    "export_official",
    "load_official",
    "name_map",
    "official_name",
    "official_state",
    "our_weights",
]
