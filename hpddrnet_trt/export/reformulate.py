"""Exact rewrites of the trained network for deployment.

Every rewrite is algebraically exact, rounding apart; of a low rank, less than a half-precision weight's rounding is
left out (:data:`RANK_TOLERANCE`). Folded weights are computed in float64.

* *Normalisation layers* fold into the convolution before them. Those that follow a sum or a pooling
  stay, reduced to a scale and a shift.
* *Channel attention*: the 1-D convolution along the channels is a 1x1 convolution with a banded
  weight matrix, which needs no transposition.
* *Position attention*: four projections become two, or narrow ones where the trained weights have a low rank, see
  :class:`FoldedPositionAttention`.
* *Grey input*: see :class:`GreyStem`.
* *Labels*: see :class:`Phases` and :class:`LabelOutput`.
* The auxiliary head is dropped.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import Manifest, NetworkConfig, Normalization
from hpddrnet_trt.models.network import ECA, ConvNormAct, HPDDRNet, NormActConv, PositionAttention

AttentionForm = Literal["matmul", "attention-op"]
OutputKind = Literal["labels", "logits"]


class DeployNetwork(nn.Module):
    """The network as it is deployed: image in, label map (or logits) out.

    Input: uint8 ``[N, 1, H, W]`` grey when ``grey_input``, otherwise the normalised float32
    ``[N, 3, H, W]``; H and W are multiples of 8. Output, by ``output``:

    * ``labels``: uint8 ``[N, H, W]``, and with ``confidence`` also float32 ``[N, H, W]``, the softmax
      probability of the label;
    * ``logits``: float32 ``[N, classes, H, W]``.

    ``network`` is copied, never changed. ``manifest`` gives the normalisation. Raises
    :class:`UsageError` for options that exclude each other.
    """

    def __init__(
        self,
        network: HPDDRNet,
        manifest: Manifest,
        *,
        attention: AttentionForm = "matmul",
        grey_input: bool = True,
        output: OutputKind = "labels",
        confidence: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ("matmul", "attention-op"):
            raise UsageError(f"unknown attention form {attention!r}; choose matmul or attention-op")
        if output not in ("labels", "logits"):
            raise UsageError(f"unknown output {output!r}; choose labels or logits")
        if confidence and output != "labels":
            raise UsageError("a confidence map goes with labels; logits already carry the confidence")
        source = copy.deepcopy(network).eval().float()
        self.backbone, head = source.backbone, source.decode_head
        self.head, self.detail, self.conv_seg = head.head, head.detail, head.conv_seg
        if grey_input:
            first = self.backbone.get_submodule("stem.0.conv")
            assert isinstance(first, nn.Conv2d)
            self.backbone.set_submodule("stem.0.conv", GreyStem(first, manifest.normalization))
        _rewrite(self, network.config, attention)
        self.output: nn.Module
        if output == "labels":
            if self.conv_seg.out_channels == 2:
                self.conv_seg = two_class_margin(self.conv_seg)
            stride, channels = network.config.logit_stride, self.conv_seg.out_channels
            self.output = LabelOutput(confidence, stride, channels, manifest.temperature or 1.0)
        else:
            self.output = FullSize(network.config.logit_stride)
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.output(self.low_resolution_scores(image))

    def low_resolution_scores(self, image: Tensor) -> Tensor:
        """What the classifier gives at 1/8 (with ``detail`` 1/4) of the input size: logits, or with two
        classes and labels as output, the logit of class 1 minus that of class 0."""
        features = self.backbone(image)
        main = self.head(features.main)
        return self.conv_seg(main if self.detail is None else self.detail(main, features.fine))


# ---------------------------------------------------------------------------------- input


class GreyStem(nn.Module):
    """Normalisation, the three identical channels and the first convolution in one; exact at borders.

    The network was trained on ``n_c = (g - m_c) / s_c``, padded with zeros *after* normalisation.
    With one ``x = (g - m) / s``, inside the image ``n_c = x s / s_c + (m - m_c) / s_c``, outside it is
    zero. The convolution of the three channels is therefore that of ``x`` with the weights
    ``sum_c W_c s / s_c``, plus that of a channel that is one inside the image with the weights
    ``sum_c W_c (m - m_c) / s_c``; both channels are padded with zeros. When all three means are equal
    the second channel vanishes and is left out.

    ``s`` is a power of two and, where there are two channels, ``m`` is an integer: ``x`` is then exact
    in FP16 and within about +-2.5, so INT8 uses its whole range.

    ``[N, 1, H, W]`` uint8 in; the convolution's output out.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, conv: nn.Conv2d, normalization: Normalization) -> None:
        super().__init__()
        mean = torch.tensor(normalization.mean, dtype=torch.float64)
        std = torch.tensor(normalization.std, dtype=torch.float64)
        one_mean = bool((mean == mean[0]).all())
        m = float(mean[0]) if one_mean else float(mean.mean().round())
        s = 2.0 ** round(math.log2(float(std.mean())))
        weight = conv.weight.detach().double()
        grey = (weight * (s / std)[:, None, None]).sum(1, keepdim=True)
        ones = (weight * ((m - mean) / std)[:, None, None]).sum(1, keepdim=True)
        folded = grey if one_mean else torch.cat([grey, ones], dim=1)
        # One multiplication and one addition make both channels: (g/s - m/s) and (0 g + 1).
        self.register_buffer("scale", torch.tensor([1 / s] if one_mean else [1 / s, 0.0]).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s] if one_mean else [-m / s, 1.0]).view(1, -1, 1, 1))
        self.conv = _conv_like(conv, folded, None if conv.bias is None else conv.bias.detach().double())

    def forward(self, image: Tensor) -> Tensor:
        # A uint8 tensor may touch nothing but a cast: TensorRT builds no other operation on it.
        return self.conv(image.to(self.conv.weight.dtype) * self.scale + self.shift)


# ----------------------------------------------------------------------------- attention


# Singular values below this share of the largest are left out: a quarter of the rounding of an FP16 weight (2^-11).
RANK_TOLERANCE = 2.0**-13
RANK_STEP = 32  # ranks are rounded up to it: what a matrix unit (AMX, tensor cores) takes of one row at a time


class FoldedPositionAttention(nn.Module):
    """Position attention with its projections folded, ``[N, C, H, W]`` in and out.

    With y the output of the 3x3 convolution as T tokens of C channels, the trained module computes
    ``softmax((y Wq' + bq)(y Wk' + bk)' / sqrt(C)) (y Wv' + bv) Wo' + bo``. Softmax ignores terms that
    are constant along a row, so ``bk`` vanishes and the scores are ``(y A + b) y'`` with
    ``A = Wq' Wk / sqrt(C)`` and ``b = bq Wk / sqrt(C)``. Rows of the softmax sum to one, so the last
    two projections fold as well: ``(softmax(.) y) (Wo Wv)' + (Wo bv + bo)``. Keys and values are the
    same tensor, and scaling happens before the product.

    Weight decay leaves trained ``[A; b]`` and ``Wo Wv`` with few singular values that count (nasa-super1: at most 32 of
    128 and of 256). Where that is at most half of C, the matrix is split in two of that rank, ``L R``: keys are
    ``y R'`` and queries ``y L + l``; values are ``y R'`` and the output ``(softmax(.) (y R')) L'``. The products over
    all pairs of tokens, nearly all of the work, then have that many channels instead of C. One projection makes all
    three: several would each want the tokens in an order of their own.
    """

    def __init__(self, source: PositionAttention, form: AttentionForm = "matmul") -> None:
        super().__init__()
        self.form = form
        self.cnn = source.cnn
        pa = source.pa
        wq, bq = _weights(pa.fc_q)
        wk, _ = _weights(pa.fc_k)
        wv, bv = _weights(pa.fc_v)
        wo, bo = _weights(pa.fc_o)
        scores = torch.cat([wq.T @ wk, bq[None] @ wk]) / math.sqrt(wq.shape[0])
        mixing = wo @ wv
        of_scores, of_mixing = _low_rank(scores), _low_rank(mixing)
        self.widths: list[int] | None = None  # of queries, keys and values, where they are narrow
        if of_scores is None or of_mixing is None:
            self.project = _linear(scores[:-1].T, scores[-1])
        else:
            (query, keys), (mixing, values) = of_scores, of_mixing
            self.widths = [len(keys), len(keys), len(values)]
            bias = torch.cat([query[-1], query.new_zeros(len(keys) + len(values))])
            self.project = _linear(torch.cat([query[:-1].T, keys, values]), bias)
        self.out = _linear(mixing, wo @ bv + bo)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cnn(x)
        columns = y.flatten(2)  # [N, C, T]
        tokens = columns.transpose(1, 2)
        projected = self.project(tokens)
        query, keys, values = (projected, tokens, tokens) if self.widths is None else projected.split(self.widths, -1)
        if self.form == "attention-op":
            query, keys, values = query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)  # one head
            mixed = F.scaled_dot_product_attention(query, keys, values, scale=1.0).squeeze(1)
        else:
            if self.widths is not None:
                columns = keys.transpose(1, 2)  # [N, channels of keys, T]
            mixed = torch.softmax(query @ columns, dim=-1) @ values
        return self.out(mixed).transpose(1, 2).reshape(y.shape)


def _low_rank(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Two matrices whose product is ``matrix``, of the rank that counts; None where that is too much to save work."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    counting = int((singular > RANK_TOLERANCE * singular[0]).sum())
    rank = RANK_STEP * max(1, math.ceil(counting / RANK_STEP))
    if rank > matrix.shape[1] // 2:
        return None
    root = singular[:rank].sqrt()  # on both sides, so that neither leaves the range of FP16
    return left[:, :rank] * root, root[:, None] * right[:rank]


class FoldedECA(nn.Module):
    """Channel attention with the convolution along the channels written as a 1x1 convolution."""

    def __init__(self, source: ECA, channels: int) -> None:
        super().__init__()
        taps = source.conv.weight.detach().double().flatten()
        reach = len(taps) // 2
        band = sum(
            torch.diag(taps[reach + offset].expand(channels - abs(offset)), offset)
            for offset in range(-reach, reach + 1)
        )
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.mix.weight = nn.Parameter(torch.as_tensor(band).float().view(channels, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.mix(F.adaptive_avg_pool2d(x, 1)))


# -------------------------------------------------------------------------------- output


class FullSize(nn.Module):
    """Low-resolution scores to the input's own size: bilinear, ``align_corners=False``.

    The sizes are multiples of 8, so the factor ``stride`` is exact and the graph needs no shape
    arithmetic.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, scores: Tensor) -> Tensor:
        return F.interpolate(scores, scale_factor=self.stride, mode="bilinear", align_corners=False)


class Phases(nn.Module):
    """Bilinear enlargement by ``stride`` as one small convolution; exact, borders included.

    An output pixel lies at one of ``stride`` x ``stride`` phases of its source pixel, and each phase is
    a fixed weighting of the 3x3 source pixels around it (bilinear, ``align_corners=False``; beyond the
    border the outermost pixel counts, so the source is padded with it). All phases are channels of
    one convolution at the low resolution: scores ``[N, C, h, w]`` in, C tensors ``[N, stride^2, h, w]``
    out, one per class, that a depth-to-space step would bring to full size. The weights are multiples
    of ``1 / (2 stride)^2``: exact in FP16 and BF16.

    Runtimes do this faster than an image resize of few channels, and what follows (:class:`LabelOutput`)
    need not bring every class to full size.
    """

    def __init__(self, classes: int, stride: int) -> None:
        super().__init__()
        self.phases = stride**2
        taps = torch.zeros(stride, 3, dtype=torch.float64)
        for phase in range(stride):
            offset = (phase + 0.5) / stride - 0.5  # from the centre of the source pixel, in source pixels
            taps[phase, 1] = 1 - abs(offset)
            taps[phase, 0 if offset < 0 else 2] = abs(offset)
        kernels = torch.einsum("ai,bj->abij", taps, taps).reshape(self.phases, 3, 3)
        weight = torch.zeros(classes, self.phases, classes, 3, 3, dtype=torch.float64)
        for index in range(classes):
            weight[index, :, index] = kernels
        self.conv = nn.Conv2d(classes, classes * self.phases, 3, bias=False)
        self.conv.weight = nn.Parameter(weight.flatten(0, 1).float())

    def forward(self, scores: Tensor) -> tuple[Tensor, ...]:
        return torch.split(self.conv(F.pad(scores, (1, 1, 1, 1), mode="replicate")), self.phases, dim=1)


# With more classes the convolution, whose work grows with their square, costs more than a resize.
MAX_PHASE_CLASSES = 8


class LabelOutput(nn.Module):
    """Low-resolution scores to uint8 labels ``[N, H, W]`` at full size, ties going to the first class.

    Up to :data:`MAX_PHASE_CLASSES` classes are enlarged as :class:`Phases` and compared one after the
    other, element by element, which runtimes fuse; only labels are brought to full size. More classes
    are resized and go through arg-max: in phases, even with a convolution of one group per class, they took
    longer on a CPU (ONNX Runtime, two threads, 1024x1024: 136 ms instead of 74 with 9 classes, 267 instead of 225
    with 19, 790 instead of 217 with 64; OpenVINO 103 instead of 80, 270 of 146, 836 of 454); on a GPU neither was
    measured.

    One score channel is the margin of class 1 over class 0 (see :func:`two_class_margin`). With
    ``confidence`` the label's softmax probability follows as float32; it is one over the sum of
    ``exp((score - best score) / temperature)``, so no softmax over all classes is stored.
    """

    def __init__(self, confidence: bool, stride: int, classes: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.confidence, self.stride, self.temperature = confidence, stride, temperature
        self.enlarge = Phases(classes, stride) if classes <= MAX_PHASE_CLASSES else FullSize(stride)

    def forward(self, scores: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(self.enlarge, FullSize):
            return self._from_resized(self.enlarge(scores))
        planes = self.enlarge(scores)
        if len(planes) == 1:
            return self._from_margin(self._full_size(planes[0]))
        labels, best = _first_largest(planes)
        # Depth to space moves floating point everywhere; TensorRT builds it for no 8-bit type.
        full = self._full_size(labels).to(torch.uint8)
        return (full, self._full_size(self._confidence(planes, best))) if self.confidence else full

    def _full_size(self, phases: Tensor) -> Tensor:
        return F.pixel_shuffle(phases, self.stride).squeeze(1)

    def _from_margin(self, margin: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels = _to_uint8(margin > 0)
        return (labels, torch.sigmoid(self._cooled(margin.float().abs()))) if self.confidence else labels

    def _from_resized(self, full: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels = _to_uint8(full.argmax(dim=1))
        if not self.confidence:
            return labels
        full = full.float()
        best = full.amax(dim=1, keepdim=True)
        return labels, torch.exp(self._cooled(full - best)).sum(dim=1).reciprocal()

    def _confidence(self, planes: Sequence[Tensor], best: Tensor) -> Tensor:
        best = best.float()
        total = torch.exp(self._cooled(planes[0].float() - best))
        for plane in planes[1:]:
            total = total + torch.exp(self._cooled(plane.float() - best))
        return total.reciprocal()

    def _cooled(self, differences: Tensor) -> Tensor:
        """Differences of scores at the model's temperature."""
        return differences if self.temperature == 1 else differences / self.temperature


def _to_uint8(labels: Tensor) -> Tensor:
    """By way of floating point, the only type that TensorRT documents to become uint8 (its Identity operator)."""
    return labels.float().to(torch.uint8)


def _first_largest(planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Index of the first largest of two or more equally shaped tensors, in their own type, and the largest itself."""
    best, labels = torch.maximum(planes[0], planes[1]), (planes[1] > planes[0]).to(planes[0].dtype)
    for index, plane in enumerate(planes[2:], start=2):
        labels = torch.where(plane > best, float(index), labels)
        best = torch.maximum(best, plane)
    return labels, best


def two_class_margin(classifier: nn.Conv2d) -> nn.Conv2d:
    """A classifier of two classes as one channel, logit 1 minus logit 0: half the work of the resize.

    Resizing is linear, so ``resize(l1) > resize(l0)`` is ``resize(l1 - l0) > 0``.
    """
    weight = classifier.weight.detach().double()
    bias = torch.zeros(2, dtype=torch.float64) if classifier.bias is None else classifier.bias.detach().double()
    return _conv_like(classifier, weight[1:] - weight[:1], bias[1:] - bias[:1])


# ------------------------------------------------------------------------------- rewriting


def _rewrite(root: nn.Module, config: NetworkConfig, attention: AttentionForm) -> None:
    c = config.channels
    eca_channels = (4 * c, 8 * c) if config.eca == "context" else (2 * c, 2 * c)
    for name, module in list(root.named_modules()):
        if isinstance(module, PositionAttention):
            root.set_submodule(name, FoldedPositionAttention(module, attention))
        elif isinstance(module, ECA):
            stage = int(name.rpartition(".")[2])
            root.set_submodule(name, FoldedECA(module, eca_channels[stage]))
    for module in list(root.modules()):
        if isinstance(module, ConvNormAct):
            _fold_pair(module, "conv", "bn")
        elif isinstance(module, nn.Sequential):
            children = list(module.named_children())
            for (first, conv), (second, norm) in itertools.pairwise(children):
                if not isinstance(norm, nn.BatchNorm2d):
                    continue
                if isinstance(conv, nn.Conv2d):
                    _fold_pair(module, first, second)
                elif isinstance(conv, NormActConv):  # ends with its convolution
                    conv.conv = _fold(conv.conv, norm)
                    setattr(module, second, nn.Identity())
    for module in root.modules():
        if isinstance(module, nn.BatchNorm2d):
            _reduce_norm(module)


def _fold_pair(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
    if isinstance(conv, GreyStem):
        conv.conv = _fold(conv.conv, norm)
    else:
        setattr(parent, conv_name, _fold(conv, norm))
    setattr(parent, norm_name, nn.Identity())


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    gain, shift = _gain_and_shift(norm)
    weight = conv.weight.detach().double() * gain.view(-1, 1, 1, 1)
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * gain
    return _conv_like(conv, weight, shift)


def _reduce_norm(norm: nn.BatchNorm2d) -> None:
    """Leave only a scale and a shift: small running variances would not survive FP16."""
    gain, shift = _gain_and_shift(norm)
    norm.eps = 1e-5
    norm.weight, norm.bias = nn.Parameter(gain.float()), nn.Parameter(shift.float())
    norm.running_mean, norm.running_var = torch.zeros_like(gain.float()), torch.full_like(gain.float(), 1 - norm.eps)


def _gain_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return gain, norm.bias.detach().double() - norm.running_mean.double() * gain


def _conv_like(source: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    outputs, inputs = weight.shape[:2]
    conv = nn.Conv2d(
        inputs,
        outputs,
        kernel_size=(weight.shape[2], weight.shape[3]),
        stride=(source.stride[0], source.stride[1]),
        padding=source.padding,  # type: ignore[arg-type]
        bias=bias is not None,
    )
    conv.weight = nn.Parameter(weight.float())
    if bias is not None:
        conv.bias = nn.Parameter(bias.float())
    return conv


def _weights(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.detach().double(), linear.bias.detach().double()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.float().contiguous()), nn.Parameter(bias.float())
    return linear
