import json
import math

import pytest

from genkernels.training import TrainConfig, UsageError


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"max_steps": 5, "epochs": 2}, "only one of max_steps=5 and epochs=2 can be given"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"epochs": math.inf}, "epochs must be positive"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"batch_size": True}, "batch_size must be an integer"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"lr": -1e-3}, "lr must be positive, got -0.001"),
        ({"clip": -1}, "clip must be 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"temperature": -0.1}, "temperature must be 0 or positive"),
        ({"seed": 2**63}, "seed must be an integer of 64 bits"),
        ({"devices": 0}, "devices must be an integer of at least 1"),
        ({"eval_every": -1}, "eval_every must be an integer of at least 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"precision": "bf16"}, "precision must be one of 32, bf16-mixed, 16-mixed, got 'bf16'; did you mean"),
        ({"strategy": "dpp"}, "did you mean ddp"),
        ({"accelerator": "tpu"}, "accelerator must be one of auto, cpu, gpu, got 'tpu'"),
        ({"schedule": "cosin"}, "did you mean cosine"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(setting, sentence):
    with pytest.raises(UsageError, match=sentence) as error:
        TrainConfig(**setting)
    assert "\n" not in str(error.value)


def test_it_survives_json():
    config = TrainConfig(max_steps=7, betas=(0.8, 0.9), precision="bf16-mixed", warmup=3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UsageError, match="unknown training setting 'bach_size'; did you mean batch_size"):
        TrainConfig.from_dict({"bach_size": 3})


def test_epochs_become_steps():
    assert TrainConfig(epochs=2, batch_size=10).total_steps(95) == 19
    assert TrainConfig(epochs=2, batch_size=10).total_steps(95, world_size=2) == 10
    assert TrainConfig(epochs=0.001, batch_size=10).total_steps(95) == 1
    assert TrainConfig(max_steps=4).total_steps(95) == 4
    with pytest.raises(UsageError, match="one of max_steps and epochs"):
        TrainConfig().total_steps(95)


def test_pauses_that_are_to_come_are_counted():
    for total, every, save in ((20, 6, None), (20, 5, 3), (7, 9, 0), (1, 1, 1)):
        config = TrainConfig(max_steps=total, eval_every=every, sample_every=0, checkpoint_every=save, eval_examples=10)
        for done in range(total + 1):
            steps = range(done + 1, total + 1)
            evaluations = sum(step == total or step % every == 0 for step in steps)
            saves = evaluations if save is None else sum(step == total or save and step % save == 0 for step in steps)
            expected = {"evaluate": evaluations + 4 * (done < total), "draw": int(done < total), "save": saves}
            assert config.pauses(done, total, 40) == expected, (total, done)
            assert config.pauses(done, total, 10)["evaluate"] == evaluations, "all of them each time"


def test_the_step_size_is_a_function_of_the_step():
    config = TrainConfig(max_steps=100, lr=1.0, warmup=10, schedule="cosine")
    rates = [config.lr_at(step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    default = TrainConfig(max_steps=50, lr=1.0)
    assert [default.lr_at(s, 50) for s in (0, 4, 5, 49)] == pytest.approx([0.2, 1.0, 1.0, 1.0])
    assert TrainConfig(lr=1.0).lr_at(99, 10_000) == 1.0 and TrainConfig(lr=1.0).lr_at(49, 10_000) == 0.5
    assert TrainConfig(lr=1.0, warmup=0).lr_at(0, 100) == 1.0
