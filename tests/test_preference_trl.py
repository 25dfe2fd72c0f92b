"""The path of a run on preference rows against figures of TRL's DPOTrainer, and against TRL where it is installed.

`trl_preference.json` holds what TRL computed for the rows, weights and losses of `preferred.py`:
`python tests/trl_preference.py --double --write`.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import trl_preference
from preferred import LOSSES, ours, perturb, prepared, references, written

from vlft.families import FAMILIES
from vlft.objectives import preference_losses as losses

STORED = json.loads(trl_preference.STORED.read_text())


@pytest.mark.parametrize("which", list(STORED["figures"]))
def test_losses_rewards_and_gradients_are_those_of_trl(base_of, tmp_path, which):
    """On rows with one picture, several and none; LoRA on all three towers, and full."""
    model_type, preset = which.split()
    setup = prepared(base_of(FAMILIES[model_type]), written(tmp_path).parent, preset)
    reference_A = references(setup)
    perturb(setup.model)
    assert set(STORED["figures"][which]) == set(LOSSES)
    for name, stored in STORED["figures"][which].items():
        found, _ = ours(setup, name, reference_A)
        gradients = stored["gradients"]
        assert found["loss"] == pytest.approx(stored["loss"], rel=5e-6), name
        logged = {key: stored[key] for key in trl_preference.STATISTICS}
        assert {key: found[key] for key in logged} == pytest.approx(logged, rel=1e-5, abs=1e-5), name
        assert set(found["gradients"]) == {"vision", "merger", "language"}
        for tower, (norm, projection) in gradients.items():
            assert found["gradients"][tower][0] == pytest.approx(norm, rel=1e-4), (name, tower)
            assert found["gradients"][tower][1] == pytest.approx(projection, abs=1e-4 * norm), (name, tower)


def test_the_stored_figures_are_those_of_the_installed_trl(tmp_path):
    """Every gradient is TRL's to 1e-5 of its largest value, in float64."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    found = trl_preference.compare("qwen2_vl", "lora", tmp_path, torch.float64)
    for name, one in found.items():
        assert one["loss"] == pytest.approx(STORED["figures"]["qwen2_vl lora"][name]["loss"], rel=5e-6), name
        assert one["difference"]["loss"] < 1e-6, name
        assert one["difference"]["gradient"] < 1e-5, name
        assert one["difference"]["logged"] < 1e-5, name


def test_orpo_and_simpo_are_the_formulas_of_trl():
    """TRL's trainers for them take no pictures, so only their functions of log-probabilities are compared."""
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    generator = torch.Generator().manual_seed(0)
    sums_Bn, counts_Bn = -50 * torch.rand(6, 2, generator=generator), torch.randint(1, 30, (6, 2), generator=generator)
    means_Bn = sums_Bn / counts_Bn
    accelerator = SimpleNamespace(device="cpu")

    fake = SimpleNamespace(beta=0.3, accelerator=accelerator)
    ratio_B, *rewards, _, _ = orpo.odds_ratio_loss(fake, *means_Bn.T)
    found = losses.orpo(sums_Bn, counts_Bn, weight=0.3)
    torch.testing.assert_close(found.sum, (-means_Bn[:, 0] - ratio_B).sum())
    torch.testing.assert_close([found.chosen, found.rejected], rewards)

    fake = SimpleNamespace(beta=2.0, simpo_gamma=0.5, label_smoothing=0.1, loss_type="simpo", alpha=0.0)
    fake.accelerator = accelerator
    losses_B, *rewards = cpo.cpo_loss(fake, *means_Bn.T)
    found = losses.simpo(sums_Bn, counts_Bn, beta=2.0, gamma=0.5, label_smoothing=0.1)
    torch.testing.assert_close(found.sum, losses_B.sum())
    torch.testing.assert_close([found.chosen, found.rejected], rewards)
