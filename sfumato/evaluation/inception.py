"""InceptionV3 as torch-fidelity has it, whose features published FID and KID are of."""

from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

NAME = "inception"  # in place of a folder
WIDTH = "2048"


@final
class Inception(nn.Module):
    """Maps images in [0, 1] to the 2,048 features before the last layer.

    Attributes:
        kind, source, resize: as of a VisionNetwork.
    """

    kind = NAME
    resize: ClassVar = {"size": [299, 299], "mode": "bilinear, as TensorFlow 1"}

    def __init__(self) -> None:
        """Load the published weights; torch keeps what it downloads.

        Raises:
            ValueError: the package or the weights are missing.
        """
        super().__init__()
        try:
            from torch_fidelity import (  # pyright: ignore[reportMissingImports]
                feature_extractor_inceptionv3 as published,
            )
        except (ImportError, RuntimeError) as error:  # an unfit torchvision
            raise ValueError(
                f"metric_features = {NAME!r} needs torch-fidelity ({error}): pip install "
                "'sfumato[fidelity]', or choose the folder of a DINOv2 or a CLIP"
            ) from error
        url = published.URL_INCEPTION_V3
        try:  # verified and without pickles; the package then reads the same file
            torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"metric_features = {NAME!r}: {url} cannot be read ({error}); put the file into "
                f"{torch.hub.get_dir()}/checkpoints, or choose the folder of a DINOv2 or a CLIP"
            ) from error
        self.source = str(Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2])
        self.model: Any = published.FeatureExtractorInceptionV3(NAME, [WIDTH])

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the features of images in [0, 1], rounded to 8 bits."""
        return self.model((images * 255).round().byte())[0]
