"""What a new task costs: both ways give a mask of the same size, and the vote's is the neighbours'."""

import torch

from cut.library import Library
from experiments import arrival


def test_both_ways_cut_to_the_same_size_and_leave_the_model_alone(tmp_path):
    s = arrival.setting(tmp_path, scoring=2, batch_size=2, backbone="test_efficientnet")
    assert list(s.network.heads) == [arrival.NEW] and len(Library(tmp_path).entries()) == 5
    before = {n: v.clone() for n, v in s.network.state_dict().items()}
    masks = arrival.voted(s, 1), arrival.scored(s)
    sizes = [sum(int(m.sum()) for n, m in mask.items() if m.dim() > 1) for mask in masks]
    assert sizes[0] == sizes[1] > 0
    assert all(torch.equal(v, before[n]) for n, v in s.network.state_dict().items())
    wanted = {
        n: torch.stack([e.mask[n] for e in Library(tmp_path).entries()]).any(0)
        for n in masks[0]
        if "heads" not in n and masks[0][n].dim() > 1
    }
    kept = [(masks[0][n] & ~w).float().sum() for n, w in wanted.items()]
    assert sum(kept) < 0.2 * sizes[0], "nearly all that stays was kept by some neighbour"
