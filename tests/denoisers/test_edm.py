"""Networks in NVIDIA's wrappers: whatever they keep, the denoiser is what they return."""

import functools

import pytest
import torch

import fastsched as fs

C = 0.7  # data N(0, C^2): D(z; s) = C^2 / (C^2 + s^2) z


def column(values, like):
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def exact(z, s):
    s = column(torch.as_tensor(s).expand(len(z)), z)
    return z * C**2 / (C**2 + s**2)


class Kept(torch.nn.Module):
    """The raw network of a preconditioning ``D = skip z + out F(scale z, label)``, exact for the Gaussian.

    NVIDIA's networks require class labels; with some, they add their sum.
    """

    def __init__(self, parts, label_dropout=0):
        super().__init__()
        self.parts, self.calls, self.label_dropout = parts, 0, label_dropout

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        self.calls += 1
        s, scale, skip, out = (column(part, x) for part in self.parts(noise_labels))
        z = x / scale
        answer = (exact(z, s.flatten()) - skip * z) / out
        return answer if class_labels is None else answer + class_labels.sum(1).reshape(-1, 1, 1, 1)


def edm_parts(label):
    s = (4 * label).exp()
    total = (s**2 + 0.25).sqrt()
    return s, 1 / total, 0.25 / total**2, 0.5 * s / total


def vp_parts(label):  # VPPrecond: label (M - 1) t, F predicts the noise
    t = label / 999
    s = (0.5 * 19.9 * t**2 + 0.1 * t).exp().sub(1).sqrt()
    return s, (s**2 + 1).rsqrt(), torch.ones_like(s), -s


def ve_parts(label):  # VEPrecond: label ln(s / 2)
    s = 2 * label.exp()
    return s, torch.ones_like(s), torch.ones_like(s), s


def vp_label(s):
    decay = torch.log1p(s**2)
    return 999 * 2 * decay / (0.1 + (0.01 + 2 * 19.9 * decay).sqrt())


LABELS = {edm_parts: lambda s: s.log() / 4, vp_parts: vp_label, ve_parts: lambda s: (s / 2).log()}


class Precond(torch.nn.Module):
    """As in NVlabs/edm and NVlabs/edm2, ``name`` being where the raw network is kept."""

    def __init__(self, parts, name="model", label_dim=0, sigma_data=None, label_dropout=0):
        super().__init__()
        self.label_dim, self.sigma_min, self.sigma_max, self.parts, self.name = label_dim, 0, float("inf"), parts, name
        if sigma_data is not None:
            self.sigma_data = sigma_data
        setattr(self, name, Kept(parts, label_dropout))

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **others):
        s = sigma.to(x.dtype).flatten()
        labels = class_labels
        if labels is None and self.label_dim:
            labels = torch.zeros(1, self.label_dim)
        _, scale, skip, out = (column(part, x) for part in self.parts(LABELS[self.parts](s)))
        return skip * x + out * getattr(self, self.name)(scale * x, LABELS[self.parts](s), labels, **others)


WRAPPERS = {
    "EDMPrecond": lambda: Precond(edm_parts, sigma_data=0.5),
    "EDM2": lambda: Precond(edm_parts, "unet", sigma_data=0.5),
    "k-diffusion": lambda: Precond(edm_parts, "inner_model", sigma_data=0.5),
    "EDMPrecond with classes": lambda: Precond(edm_parts, sigma_data=0.5, label_dim=3, label_dropout=0.1),
    "VPPrecond": lambda: Precond(vp_parts),
    "VEPrecond": lambda: Precond(ve_parts),
    "in DataParallel": lambda: torch.nn.DataParallel(Precond(edm_parts, sigma_data=0.5)),
    "in partial": lambda: functools.partial(Precond(edm_parts, sigma_data=0.5), force_fp32=True),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_network_is_its_denoiser(name):
    if name == "in DataParallel" and torch.cuda.is_available():
        pytest.skip("DataParallel moves the network to the GPU, and these inputs are on the CPU")
    denoiser = fs.Denoiser.from_edm(WRAPPERS[name]())
    generator = torch.Generator().manual_seed(0)
    s = torch.tensor([40.0, 2.0, 0.1])
    z = s.reshape(-1, 1, 1, 1) * torch.randn(3, 3, 4, 4, generator=generator)
    # float32, and where F is taken from D its rounding over c_out
    torch.testing.assert_close(denoiser(z, s), exact(z, s), rtol=2e-5, atol=2e-5)


def test_a_verified_network_is_called_directly():
    net = Precond(edm_parts, sigma_data=0.5)
    denoiser = fs.Denoiser.from_edm(net)
    assert (denoiser.sigma_data, denoiser.process.s_min, denoiser.process.s_max) == (0.5, 0.002, 80.0)
    denoiser(torch.ones(2, 3, 4, 4), 1.0)
    handle = net.register_forward_hook(lambda *_: pytest.fail("the wrapper was called"))
    before = net.model.calls
    denoiser(torch.ones(2, 3, 4, 4), 1.0)
    handle.remove()
    assert net.model.calls == before + 1


def test_class_labels_reach_the_network():
    net = Precond(edm_parts, sigma_data=0.5, label_dim=2)
    z = torch.ones(3, 3, 4, 4)
    labels = torch.tensor([0.25, 0.5])
    denoiser = fs.Denoiser.from_edm(net, class_labels=labels)
    expected = net(z, torch.full((3,), 2.0), labels.expand(3, -1))
    labels.zero_()  # a copy was kept
    torch.testing.assert_close(denoiser(z, 2.0), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="class_labels must be None for a raw network"):
        fs.Denoiser.from_edm(lambda x, c_noise: x, class_labels=labels)
    with pytest.raises(TypeError, match=r"class_labels must be a tensor .label_dim. or .1, label_dim."):
        fs.Denoiser.from_edm(net, class_labels=torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"such as torch.eye.label_dim..0. for the first class, got 3"):
        fs.Denoiser.from_edm(net, class_labels=3)


def test_a_raw_network_that_keeps_another_is_itself():
    class Raw(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Identity()

        def forward(self, x, c_noise):
            return -0.5 * self.model(x)

    z = torch.ones(2, 3, dtype=torch.float64)
    s, total = 2.0, (4 + 0.25) ** 0.5
    expected = 0.25 / total**2 * z + 0.5 * s / total * (-0.5 * z / total)
    torch.testing.assert_close(fs.Denoiser.from_edm(Raw())(z, s), expected)


class ScalesItsInput(torch.nn.Module):
    """A wrapper of another preconditioning that writes into its input, or its twin that does not."""

    def __init__(self, in_place):
        super().__init__()
        self.model, self.in_place = torch.nn.Identity(), in_place

    def forward(self, x, sigma, class_labels=None):
        s = column(sigma, x)
        z, factor = x.clone(), (1 + s**2).rsqrt()
        x = x.mul_(factor) if self.in_place else x * factor
        return z - s * self.model(x) * s / factor / (0.36 + s**2)


def test_a_wrapper_may_write_into_its_input():
    options = {"levels": 16, "samples": 4, "progress": False}
    clean, writing = (
        fs.measure(fs.Denoiser.from_edm(ScalesItsInput(each)), (16,), **options) for each in (False, True)
    )
    torch.testing.assert_close(writing.gram, clean.gram)


@pytest.mark.parametrize("value", ["auto", torch.ones(2), len])
def test_an_attribute_that_is_no_number_is_no_setting(value):
    network = torch.nn.Identity()
    network.__dict__["sigma_data"] = value
    assert fs.Denoiser.from_edm(network).sigma_data == 0.5


def test_labels_are_as_many_as_the_network_takes():
    net = Precond(edm_parts, label_dim=10)
    with pytest.raises(ValueError, match=r"10 entries, got shape \(1,\); its first class is torch.eye\(10\)\[0\]"):
        fs.Denoiser.from_edm(net, class_labels=torch.tensor([3]))
    fs.Denoiser.from_edm(net, class_labels=torch.eye(10)[3])
    # It would ignore them.
    with pytest.raises(ValueError, match=r"0 entries, got shape \(10,\); it is not class-conditional"):
        fs.Denoiser.from_edm(Precond(edm_parts), class_labels=torch.eye(10)[3])


def test_a_network_that_needs_a_class_and_is_given_none_is_warned_of():
    net = Precond(edm_parts, sigma_data=0.5, label_dim=10)
    with pytest.warns(UserWarning, match=r"class-conditional \(label_dim=10\) and is given no class.*torch.eye\(10\)"):
        fs.Denoiser.from_edm(net)
    fs.Denoiser.from_edm(functools.partial(net, class_labels=torch.eye(10)[:1]))
    fs.Denoiser.from_edm(Precond(edm_parts, sigma_data=0.5, label_dim=10, label_dropout=0.1))


def test_labels_bound_beside_an_argument_of_the_wrapper_alone_reach_the_network():
    class LabelsAtLowLevels(Kept):  # nothing of them shows where the wrapper and its network are compared
        def forward(self, x, noise_labels, class_labels):
            low = column((noise_labels < -0.3).float(), x)
            return super().forward(x, noise_labels, None if class_labels is None else low * class_labels.sum())

    net = Precond(edm_parts, sigma_data=0.5, label_dim=2)
    net.model = LabelsAtLowLevels(edm_parts)
    labels = torch.tensor([[0.25, 0.5]])
    denoiser = fs.Denoiser.from_edm(functools.partial(net, class_labels=labels, force_fp32=True))
    z = torch.ones(3, 3, 4, 4)
    torch.testing.assert_close(denoiser(z, 0.1), net(z, torch.full((3,), 0.1), labels), rtol=1e-5, atol=1e-5)


def test_a_wrapper_in_evaluation_mode_is_not_said_to_be_in_training_mode():
    class Draws(Precond):  # without use of the numbers, so that the answers are right
        def forward(self, x, sigma, **others):
            torch.rand(1)
            return super().forward(x, sigma, **others)

    net = Draws(vp_parts)
    options = {"levels": 16, "samples": 4, "progress": False}
    with pytest.warns(UserWarning, match="torch's random numbers were drawn"):
        fs.measure(fs.Denoiser.from_edm(net.eval()), (3, 4, 4), **options)
    with pytest.raises(ValueError, match="in training mode, and draws random numbers"):
        fs.measure(fs.Denoiser.from_edm(net.train()), (3, 4, 4), **options)
