"""A network that fails is explained: how it was called, and what may be wrong."""

import pytest
import torch

import fastsched as fs

ALPHAS = torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64)


def measured(network, shape, **options):
    return fs.measure(fs.Denoiser.from_epsilon(network, ALPHAS), shape, progress=False, **options)


def test_missing_conditions_are_to_be_bound():
    def unet(x, t, encoder_hidden_states):
        return x

    with pytest.raises(
        ValueError, match=r"called with x \(1, 3, 8, 8\) in float32.*encoder_hidden_states.*lambda x, t"
    ):
        measured(unet, (3, 8, 8))


def test_networks_of_one_argument_are_to_be_wrapped():
    with pytest.raises(ValueError, match=r"fewer arguments than \(x, condition\)"):
        measured(lambda x: x, (3,))


def test_a_device_that_is_not_here_is_no_missing_condition():
    def network(x, t):
        raise AssertionError("Torch not compiled with CUDA enabled")  # what x.cuda() raises then

    with pytest.raises(ValueError, match=r"a device that is not here; .*x\.device"):
        measured(network, (4,))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (torch.nn.Linear(8, 8), (4,)),
        (torch.nn.Conv2d(4, 4, 3, padding=1), (3, 8, 8)),
        (lambda x: x + torch.zeros(7), (4,)),
        (torch.nn.LayerNorm(8), (4,)),
        (torch.nn.Conv2d(4, 4, 3, padding=1), (4,)),
        (lambda x: torch.cat([x, torch.zeros(1, 2)], 1), (2, 3)),
    ],
)
def test_wrong_shapes_point_to_the_shape(network, shape):
    with pytest.raises(ValueError, match=r"failed when called with x .*is shape, or that of the noise"):
        measured(lambda x, t: network(x), shape)


TABLE = torch.zeros(1000, 4)


@pytest.mark.parametrize(
    "network",
    [
        lambda x, t: TABLE[t],
        lambda x, t: torch.nn.functional.embedding(t, TABLE),
        lambda x, t: TABLE.index_select(0, t),
        lambda x, t: TABLE.gather(0, t[:, None].expand(-1, 4)),
        lambda x, t: x + torch.from_numpy(TABLE.numpy()[t.numpy()]),
        lambda x, t: x + TABLE.tolist()[t[0]][0],
        lambda x, t: x + TABLE.tolist()[t[0].item()][0],
    ],
)
def test_tables_indexed_by_a_fractional_timestep_point_to_integer_timesteps(network):
    with pytest.raises(ValueError, match=r"failed when called with x .*integer_timesteps=True of from_epsilon"):
        measured(network, (4,))


def test_a_table_that_is_too_short_is_named():
    with pytest.raises(ValueError, match=r"failed when called with x .*out of bounds.*one for each timestep"):
        measured(lambda x, t: x + TABLE[:100][t.long()], (4,))
    with pytest.raises(ValueError, match=r"failed when called with x .*out of range.*one for each timestep"):
        measured(lambda x, t: x + [1.0][int(t[0])], (4,))


class Wide(torch.nn.Module):
    """Multiplies by the condition, which is float32."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x * t[:, None])


def test_a_wrong_dtype_points_to_dtype():
    network = torch.nn.Linear(8, 8).double()
    with pytest.raises(ValueError, match=r"in float32.*give dtype="):
        measured(lambda x, t: network(x), (8,))
    # which would do
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: network(z) * 0 + z / (1 + s[:, None] ** 2), 0.1, 10.0)
    assert fs.measure(denoiser, (8,), levels=8, samples=1, dtype=torch.float64, progress=False).samples == 1


def test_a_level_that_a_network_of_16_bits_does_not_cast_is_named():
    network = torch.nn.Linear(8, 8).bfloat16()
    with pytest.raises(ValueError, match=r"in bfloat16.*time or level stays float32, so the network must cast"):
        measured(Wide(network), (8,))


def test_a_wrong_device_points_to_device():
    weight = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match=r"on cpu.*another device"):
        measured(lambda x, t: x + weight, (4,))


def test_the_network_s_own_errors_stay_as_they_are():
    def network(x, t):
        raise RuntimeError("the cat is out")

    with pytest.raises(RuntimeError, match="the cat is out"):
        measured(network, (4,))

    def full(x, t):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB on cuda:0")

    with pytest.raises(MemoryError, match="batch_size"):
        measured(full, (4,))


def test_a_missing_key_says_what_was_asked():
    with pytest.raises(
        ValueError, match=r"called with x \(1, 4\) in float32.*KeyError: 'prompt'; .*must be bound"
    ) as found:
        measured(lambda x, t: x + {}["prompt"], (4,))
    assert isinstance(found.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "one_level",
    [lambda t: t if t > 0 else -t, lambda t: t.item(), lambda t: float(t), lambda t: float(t.numpy()),
     lambda t: 1.0 if t.numpy() > 0 else 2.0],
)  # fmt: skip
def test_networks_of_one_sample_at_a_time_are_named(one_level):
    network = lambda z, s: z / (1 + one_level(s) ** 2)
    with pytest.raises(ValueError, match="it takes one sample at a time"):
        fs.Denoiser.from_denoiser(network, 0.1, 10.0)(torch.ones(2, 4), torch.tensor([1.0, 2.0]))


def test_a_class_of_modules_is_no_network():
    with pytest.raises(TypeError, match=r"fn must be a module, got the class Linear; make one: Linear\(...\)"):
        measured(torch.nn.Linear, (4,))


def test_a_layer_that_needs_several_values_is_named():
    norm = torch.nn.BatchNorm1d(5, track_running_stats=False).eval()
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: norm(z), 0.01, 20.0)
    with pytest.raises(ValueError, match=r"failed when called with x \(1, 5\).*normalises over the batch"):
        fs.measure(denoiser, (5,), progress=False)


def test_conditions_that_go_by_name_are_to_be_wrapped():
    denoiser = fs.Denoiser.from_denoiser(lambda z, *, sigma: z, 0.01, 20.0)
    with pytest.raises(ValueError, match=r"or network\(x, sigma=t\) if it takes the condition by name"):
        fs.measure(denoiser, (5,), progress=False)


def test_a_failed_assertion_without_words_is_shown():
    def network(x, t):
        if not x.mean() == t:
            raise AssertionError
        return x

    with pytest.raises(ValueError, match=r"called with x .*AssertionError: raise AssertionError; .*labels.expand\(len"):
        measured(network, (3,))


def test_a_network_that_is_exported_for_one_size_of_batches_is_no_missing_condition():
    of_two = torch.export.export(torch.nn.Bilinear(3, 1, 3), (torch.ones(2, 3), torch.ones(2, 1))).module()
    with pytest.raises(ValueError, match=r"batches of one size alone: export it with a dynamic batch .*batch_size=1"):
        measured(lambda x, t: of_two(x, t[:, None]), (3,))


@pytest.mark.parametrize("loss", [lambda x, t: x.mean(), lambda x, t: x.square().sum()])
def test_a_training_loss_points_to_the_network_inside(loss):
    with pytest.raises(ValueError, match=r"shape \(\) .*training loss: pass the network that this wrapper holds"):
        measured(loss, (3,))


def test_a_network_that_takes_the_time_first_is_asked_for_the_order():
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match="take x first, then the time"):
        measured(lambda t, x: network(x), (3, 8, 8))


def test_a_loss_among_others_points_to_the_prediction():
    with pytest.raises(TypeError, match=r"returned tuple, .* no training loss"):  # as pytorch-lightning's modules
        measured(lambda x, t: (x.mean(), {"loss": x.mean()}), (3,))


def test_wrappers_that_take_the_images_alone_point_to_the_network_inside():
    with pytest.raises(ValueError, match="training loss, pass the network that it holds"):
        measured(lambda images: images.mean(), (3,))


@pytest.mark.parametrize(
    "message",
    [
        "Input type (float) and bias type (c10::BFloat16) should be the same",
        "linalg.vector_norm: the dtype of the input (Double) should be convertible without narrowing",
        "expected dtype double for `end` but got dtype float",
    ],
)
def test_another_dtype_is_explained_in_every_wording_of_torch(message):
    def network(x, t):
        raise RuntimeError(message)

    with pytest.raises(ValueError, match="another dtype; give dtype="):
        measured(network, (3,))


def test_a_network_that_takes_gradients_is_told_to_turn_them_on():
    def score(x, t):  # of an energy
        x.requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0] * 0.1

    with pytest.raises(ValueError, match=r"failed when called with x .*does not require grad.*torch\.enable_grad\(\)"):
        measured(score, (4,))
