"""Any CLIP model that open_clip opens: a folder in its format, or a name and a pretrained tag."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud_server.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CONFIG = "open_clip_config.json"
_ONLINE = "hf-hub:"


class Clip:
    """A CLIP model on a device, loaded when it is first used; copies for other processes are light.

    `model` is a folder with open_clip_config.json, a hub's `hf-hub:OWNER/NAME`, or one of
    open_clip's names, which needs a `pretrained` tag or file of weights. Raises ModelError.
    """

    def __init__(
        self, model: str | Path, pretrained: str | None = None, device: str = "cpu"
    ) -> None:
        self.model, self.pretrained, self.device = str(model), pretrained, device
        folder = Path(self.model).expanduser()
        self._folder = folder.resolve() if folder.is_dir() else None
        if self._folder:
            if not (self._folder / CONFIG).is_file():
                raise ModelError(f"{model} holds no {CONFIG}; name an open_clip folder")
            if pretrained:
                raise ModelError(
                    f"the folder {model} has its own weights; leave out {pretrained!r}"
                )
        elif not self.model.startswith(_ONLINE):
            self._check_name()

    def _check_name(self) -> None:
        open_clip = _open_clip()
        if self.model not in open_clip.list_models():
            raise ModelError(
                f"there is no CLIP model {self.model!r}; give a folder with {CONFIG}, "
                f"{_ONLINE}OWNER/NAME, or a name that open_clip.list_models() has"
            )
        tags = open_clip.list_pretrained_tags_by_model(self.model)
        file = Path(self.pretrained or "").is_file()
        if not file and self.pretrained not in tags:
            raise ModelError(
                f"{self.model} has no pretrained weights {self.pretrained!r}; choose of "
                f"{', '.join(tags) or 'none, so name a file of weights'}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.pretrained, self.device)

    @property
    def name(self) -> str:
        """What the model is called; of a folder, its own name alone."""
        if self._folder:
            return self._folder.name
        return f"{self.model}/{Path(self.pretrained).name}" if self.pretrained else self.model

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights; of a folder, over its settings and tokenizer as well."""
        from cloud_server.training.digest import folder_digest

        if self._folder:
            return folder_digest(self._folder)
        total = hashlib.sha256()
        for key, weight in sorted(self.network.state_dict().items()):
            total.update(f"{key} {tuple(weight.shape)} ".encode())
            total.update(weight.cpu().float().contiguous().numpy().tobytes())
        return total.hexdigest()

    @property
    def network(self) -> Any:
        """open_clip's model, not training."""
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, Any, Any]:
        open_clip = _open_clip()
        name = f"local-dir:{self._folder}" if self._folder else self.model
        part = f"the CLIP model {self.name}"
        try:
            network, preprocess = open_clip.create_model_from_pretrained(name, self.pretrained)
            part = f"the tokenizer of {part}, which its folder must hold"
            tokenizer = open_clip.get_tokenizer(name)
        # Loading runs the code of several libraries over foreign files; it ends in one sentence.
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"cannot load {part}: {said}") from error
        return network.to(self.device).eval(), preprocess, tokenizer

    @property
    def scale(self) -> float:
        """What the model multiplies cosines with to get logits."""
        return float(self.network.logit_scale.detach().exp())

    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Return the features (N, d) of texts, of length 1."""
        import torch

        network, _, tokenizer = self._opened
        with torch.inference_mode():
            parts = [
                network.encode_text(
                    tokenizer(list(texts[i : i + batch])).to(self.device), normalize=True
                )
                for i in range(0, len(texts), batch)
            ]
        return torch.cat(parts)

    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """Return the features (B, d) of pictures, of length 1."""
        import torch

        network, preprocess, _ = self._opened
        with torch.inference_mode():
            inputs = torch.stack([preprocess(picture) for picture in pictures])
            return network.encode_image(inputs.to(self.device), normalize=True)


def _open_clip() -> Any:
    from cloud_server.torchvision_guard import guard

    guard()
    import open_clip

    return open_clip
