"""Recurrent networks: torch's kernels, the cells, and hand-written ones."""

from __future__ import annotations

import torch
from tests.zoo.case import axis, case, tokens
from torch import nn

SEQUENCE = {"inputs": (3, 7, 10), "other": (2, 5, 10)}


class Recurrent(nn.Module):
    """A linear layer, a recurrent one, a linear layer on the last step."""

    def __init__(self, rnn, hidden):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.rnn = rnn
        self.head = nn.Linear(hidden, 4)

    def forward(self, x):
        out, _ = self.rnn(self.embed(x))
        return self.head(out[:, -1])


def cell(name, out=""):
    """The members of the hidden axis of a layer: its gates' rows, its recurrent columns, and what reads it."""
    rows = " ".join(f"{name % part}:0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return f"{rows} {name % 'weight_hh'}:1 {out}"


@case(
    "lstm",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("embed:0 rnn.weight_ih_l0:1", 8, label="i"),
        axis(cell("rnn.%s_l0", "head.weight:1"), 12, label="h"),
    ],
    sizes={"rnn.input_size": "i", "rnn.hidden_size": "h", "head.in_features": "h"},
)
def lstm():
    return Recurrent(nn.LSTM(8, 12, batch_first=True), 12)


@case(
    "lstm_layers_bidirectional",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("embed:0 rnn.weight_ih_l0:1 rnn.weight_ih_l0_reverse:1", 8),
        # One axis: the states of all layers and directions are one tensor, (layers, batch, hidden).
        axis(
            cell("rnn.%s_l0")
            + cell("rnn.%s_l0_reverse")
            + cell("rnn.%s_l1")
            + cell("rnn.%s_l1_reverse")
            + "rnn.weight_ih_l1:1 rnn.weight_ih_l1_reverse:1 head.weight:1",
            6,
            label="h",
        ),
    ],
    sizes={"rnn.hidden_size": "h", "head.in_features": "2 * h"},
)
def lstm_layers_bidirectional():
    return Recurrent(nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1), 12)


@case(
    "lstm_projection",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis(
            "rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0 rnn.weight_hr_l0:1", 12, label="h"
        ),
        axis("rnn.weight_hr_l0:0 rnn.weight_hh_l0:1 head.weight:1", 5, label="p"),
        axis("embed:0 rnn.weight_ih_l0:1", 8),
    ],
    sizes={"rnn.hidden_size": "h", "rnn.proj_size": "p"},
    warns="LSTM with projections is not supported with oneDNN",
)
def lstm_projection():
    return Recurrent(nn.LSTM(8, 12, batch_first=True, proj_size=5), 5)


@case(
    "gru_layers",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("embed:0 rnn.weight_ih_l0:1", 8),
        axis(cell("rnn.%s_l0", "rnn.weight_ih_l1:1 ") + cell("rnn.%s_l1", "head.weight:1"), 10, label="h"),
    ],
    sizes={"rnn.hidden_size": "h"},
)
def gru_layers():
    return Recurrent(nn.GRU(8, 10, num_layers=2, batch_first=True), 10)


@case(
    "rnn_relu_no_bias",
    **SEQUENCE,
    share=0.98,
    expected=[
        axis("embed:0 rnn.weight_ih_l0:1", 8),
        axis("rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.weight_hh_l0:1 head.weight:1", 12, label="h"),
    ],
    sizes={"rnn.hidden_size": "h"},
)
def rnn_relu_no_bias():
    return Recurrent(nn.RNN(8, 12, nonlinearity="relu", bias=False, batch_first=True), 12)


@case(
    "gru_sequence_first_with_states",
    inputs=tokens(6, 3, 13),
    other=tokens(4, 2, 13),
    share=0.99,
    expected=[
        axis("embed:1 gru.weight_ih_l0:1 gru.weight_ih_l0_reverse:1", 8),
        axis(cell("gru.%s_l0") + cell("gru.%s_l0_reverse", "start:2 head.weight:1"), 6, label="h"),
    ],
    sizes={"hidden": "h", "gru.hidden_size": "h"},
)
class LearnedStart(nn.Module):
    """A learned first state, and the last states of both directions side by side."""

    def __init__(self, hidden=6):
        super().__init__()
        self.hidden = hidden
        self.embed = nn.Embedding(13, 8)
        self.gru = nn.GRU(8, hidden, bidirectional=True)
        self.start = nn.Parameter(torch.zeros(2, 1, hidden))
        self.head = nn.Linear(2 * hidden, 4)

    def forward(self, ids):
        _, last = self.gru(self.embed(ids), self.start.expand(-1, ids.shape[1], -1).contiguous())
        return self.head(last.permute(1, 0, 2).reshape(ids.shape[1], 2 * self.hidden))


@case(
    "packed_sequence",
    inputs=lambda: (torch.randint(13, (3, 6)), torch.tensor([6, 4, 1])),
    other=lambda: (torch.randint(13, (2, 5)), torch.tensor([5, 2])),
    share=0.99,
    fake="it packs by value",
    expected=[axis("embed:1 lstm.weight_ih_l0:1", 8), axis(cell("lstm.%s_l0", "head.weight:1"), 10)],
)
class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.lstm = nn.LSTM(8, 10, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, ids, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True)
        out, (h, _) = self.lstm(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return self.head(out.mean(1) + h[-1])


@case(
    "cells_in_a_loop",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis(
            "lstm.weight_ih:0 lstm.weight_hh:0 lstm.weight_hh:1 lstm.bias_ih:0 lstm.bias_hh:0 gru.weight_ih:1",
            8,
            label="a",
        ),
        axis(
            "gru.weight_ih:0 gru.weight_hh:0 gru.weight_hh:1 gru.bias_ih:0 gru.bias_hh:0 rnn.weight_ih:1", 9, label="b"
        ),
        axis("rnn.weight_ih:0 rnn.weight_hh:0 rnn.weight_hh:1 rnn.bias_ih:0 rnn.bias_hh:0 head.weight:1", 7, label="c"),
    ],
    sizes={"lstm.hidden_size": "a", "gru.input_size": "a", "gru.hidden_size": "b", "rnn.hidden_size": "c"},
)
class Cells(nn.Module):
    """States begin at zeros of the size the cell keeps, or at the cell's own."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(10, 8), nn.GRUCell(8, 9), nn.RNNCell(9, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        h = x.new_zeros(x.size(0), self.lstm.hidden_size)
        state = (h, torch.zeros_like(h))
        g = torch.zeros(x.size(0), self.gru.hidden_size, dtype=x.dtype, device=x.device)
        r = None
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
            g = self.gru(state[0], g)
            r = self.rnn(g, r)
        return self.head(r)


@case(
    "lstm_by_hand",
    **SEQUENCE,
    share=0.99,
    expected=[axis("inside:0 recur:0 recur.weight:1 head.weight:1", 9, label="h")],
    sizes={"hidden": "h", "inside.out_features": "4 * h"},
)
class HandLSTM(nn.Module):
    """Four gates from one layer, by chunk."""

    def __init__(self, hidden=9):
        super().__init__()
        self.hidden = hidden
        self.inside = nn.Linear(10, 4 * hidden)
        self.recur = nn.Linear(hidden, 4 * hidden, bias=False)
        self.head = nn.Linear(hidden, 4)

    def forward(self, x):
        h = torch.zeros(len(x), self.hidden).to(x)
        c = torch.zeros(len(x), self.hidden).to(x)
        for step in x.unbind(1):
            i, f, g, o = (self.inside(step) + self.recur(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


@case(
    "convolutional_gru",
    inputs=(2, 4, 3, 6, 6),
    other=(1, 3, 3, 5, 8),
    share=0.99,
    expected=[axis("gates:0 gates.weight:1 candidate:0 candidate.weight:1 head.weight:1", 8, label="h")],
    sizes={"channels": "h", "gates.out_channels": "2 * h", "gates.in_channels": "3 + h"},
)
class ConvGRU(nn.Module):
    """Input and state side by side: part of the input channels is the state."""

    def __init__(self, channels=8):
        super().__init__()
        self.channels = channels
        self.gates = nn.Conv2d(3 + channels, 2 * channels, 3, padding=1)
        self.candidate = nn.Conv2d(3 + channels, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, video):
        b, t, _, height, width = video.shape
        h = video.new_zeros((b, self.channels, height, width))
        for i in range(t):
            x = video[:, i]
            z, r = torch.sigmoid(self.gates(torch.cat([x, h], 1))).split(self.channels, dim=1)
            h = (1 - z) * h + z * torch.tanh(self.candidate(torch.cat([x, r * h], 1)))
        return self.head(h)


@case(
    "hidden_state_is_output",
    **SEQUENCE,
    share=0.59,
    expected=[axis("embed:0 rnn.weight_ih_l0:1", 8)],
    frozen={"rnn.weight_hh_l0:0": "output"},
)
class ReturnsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.rnn = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(self.embed(x))


@case(
    "state_space",
    **SEQUENCE,
    share=0.99,
    expected=[
        axis("inside:0 conv:0 dt:0 dt.weight:1 bc.weight:1 a_log:0 skip:0 out.weight:1", 12, label="d"),
        axis("bc:0 a_log:1", 4, label="n"),
    ],
    sizes={"state": "n", "conv.groups": "d", "inside.out_features": "2 * d", "bc.out_features": "2 * n"},
)
class SelectiveScan(nn.Module):
    """Mamba's block in its slow form."""

    def __init__(self, inner=12, state=4):
        super().__init__()
        self.state = state
        self.inside = nn.Linear(10, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.dt = nn.Linear(inner, inner)
        self.bc = nn.Linear(inner, 2 * state, bias=False)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, 4)

    def forward(self, x):
        n = x.shape[1]
        x, gate = self.inside(x).chunk(2, dim=-1)
        x = torch.nn.functional.silu(self.conv(x.transpose(1, 2))[..., :n].transpose(1, 2))
        delta = torch.nn.functional.softplus(self.dt(x))
        b, c = torch.split(self.bc(x), [self.state, self.state], dim=-1)
        decay = torch.exp(delta.unsqueeze(-1) * -torch.exp(self.a_log))
        write = (delta * x).unsqueeze(-1) * b.unsqueeze(2)
        h = torch.zeros_like(write[:, 0])
        out = []
        for i in range(n):
            h = decay[:, i] * h + write[:, i]
            out.append(torch.einsum("bdn,bn->bd", h, c[:, i]))
        y = torch.stack(out, dim=1) + x * self.skip
        return self.out(y * torch.nn.functional.silu(gate))


@case(
    "gated_residual_like_another",
    inputs=(2, 5, 6),
    other=(3, 4, 6),
    share=0.99,
    expected=[
        axis("stem:0 norm:0 cell.weight_hh:1 cell.weight_hh:0 cell.bias_hh:0 cell.weight_ih:0 cell.bias_ih:0"
             " up.weight:1 head.weight:1", 8, exact=False),
        axis("up:0 down.weight:1", 12),
        axis("down:0 cell.weight_ih:1", 8),
    ],
    sizes={"cell.hidden_size": "8 // 2", "cell.input_size": "8 // 2"},
)  # fmt: skip
class GatedResidualLikeAnother(nn.Module):
    """A recurrent cell as residual, whose result takes the shape of its input: both widths keep equal counts."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.up, self.down, self.cell = nn.Linear(width, 12), nn.Linear(12, width), nn.GRUCell(width, width)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(self.up(self.norm(x)).relu())
        gated = self.cell(y.flatten(0, 1), x.flatten(0, 1))
        return self.head(gated.reshape_as(y))
