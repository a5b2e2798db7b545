"""Both stages of RTDMD on one page: eight Gaussians, an exact teacher, no config, no adapters.

    python examples/two_stages.py  (two minutes on one core)

With eight Gaussians as the data the teacher's velocity is known in closed form, and so is the
distribution that stage 2 should reach: p(x) exp(β x₁) / Z. Sections (§) are docs/method.md's.
"""

import time

import torch

from tiltflow import flow
from tiltflow.method.distribution_matching import matching_gradient, matching_loss
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.policy import clipped_surrogate, group_advantages, share_in_groups
from tiltflow.method.rollout import log_prob
from tiltflow.models.families.mixture import MixtureBackbone, fit_tilt

K, ETA, B, G = 4, 0.9, 256, 16  # steps, stochasticity, batch, images of one group
torch.manual_seed(0)
world = MixtureBackbone()
teacher, sigmas = world.mixture.velocity, world.few_step_sigmas(K)
generator, fake = world.new_student(0), world.new_student(0)
# No momentum: the gradient of a distribution that moves is soon out of date.
opt_generator = torch.optim.Adam(generator.parameters(), 3e-4, (0.0, 0.999))
opt_fake = torch.optim.Adam(fake.parameters(), 1e-3, (0.0, 0.999))


def level(k):
    return sigmas[k].expand(B)


def step(k, x):
    """Mean and std of sampler step k (§2), with gradient. The last step has std 0."""
    return flow.cps_mean_std(x, generator(x, level(k)), level(k), level(k + 1), ETA)


@torch.no_grad()
def rollout(stop, noise):
    states, old = [torch.randn(B, 2)], []  # and each step's log-probability
    for k in range(stop):
        mean, std = step(k, states[-1])
        states.append(mean + std * noise[k] if sigmas[k + 1] > 0 else mean)
        old.append(log_prob(states[-1], mean, std))
    return states, old


def attached(k, states):
    """Step k again, now with gradient, but at the value that the rollout recorded."""
    mean, std = step(k, states[k])
    return mean + (states[k + 1] - mean).detach(), mean, std


def update(opt, loss):
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
    opt.step()


def learn_fake(x_s, s):
    """The fake score follows the generator: velocity matching, and consistency (§4)."""
    t, noise = flow.renoise_level(s, torch.rand(B)), torch.randn(B, 2)
    delta = torch.randint(1, 201, (B,)) / 1000
    draws = FakeScoreDraws(t, noise, delta, (torch.randn(B, 2), torch.randn(B, 2)))
    update(opt_fake, fake_score_objective(fake, x_s, s, draws, 0.01, ETA)[0].mean())


def match(x_s, s):
    """Where the generator should move (§4): away from its own score, towards the teacher's."""
    t = flow.renoise_level(s, torch.rand(B))
    return matching_gradient(x_s, s, t, torch.randn(B, 2), torch.randn(B, 2), teacher, fake, ETA)


def stage_one(iterations):
    """AC-DMD: stop after a random step; the gradient goes through that step alone (§4)."""
    for i in range(iterations):
        stop = int(torch.randint(1, K + 1, ()))
        states, _ = rollout(stop, torch.randn(K, B, 2))
        learn_fake(states[-1], level(stop))
        if i % 2:  # the fake score learns twice as often, so that it describes this generator
            g = match(states[-1], level(stop))
            update(opt_generator, matching_loss(attached(stop - 1, states)[0], g).mean())


def stage_two(epochs, policy=0.02, matching=1.0, pull=0.11):
    """RTDMD: matching holds the teacher's distribution while the reward r(x) = x₁ tilts it (§5)."""
    for _ in range(epochs):
        trained = torch.randperm(K - 1)[:2].tolist()  # SubGRPO: two of the stochastic steps
        noise = torch.randn(K, B, 2)
        for k in set(range(K - 1)) - set(trained):  # noise shared in a group on the other one, so
            noise[k] = share_in_groups(noise[k], G)  # that rewards differ by the trained steps
        states, old = rollout(K, noise)
        advantages, _ = group_advantages({"x1": states[-1][:, 0]}, {"x1": 1.0}, G)
        loss = 0.0
        for k in range(K):
            learn_fake(states[k + 1], level(k + 1))
            x, mean, std = attached(k, states)
            loss = loss + matching * matching_loss(x, match(states[k + 1], level(k + 1))).mean()
            if k in trained:  # a stochastic step has a density: the policy gradient
                now = log_prob(states[k + 1], mean, std)
                surrogate = clipped_surrogate(now, old[k], advantages, 1e-5)
                loss = loss + policy * surrogate.mean() / len(trained)
            if k == K - 1:  # the last has none: the reward itself, back-propagated
                loss = loss - pull * x[:, 0].mean()
        update(opt_generator, loss)


def report(name):
    """Prints how good the samples are, and the β whose exact tilt they are nearest to."""
    x = torch.cat([rollout(K, torch.randn(K, B, 2))[0][-1] for _ in range(16)])
    beta, kl = fit_tilt(x, world.mixture, torch.tensor([1.0, 0.0]))
    share = float(world.mixture.share_within(x))
    print(f"{name:8} near a mode {share:.2f}, β {beta:+.2f} (KL {kl:.4f}), r {x[:, 0].mean():+.2f}")
    return share, beta, x


def main(iterations=3000, epochs=400):
    began, seen = time.time(), {"start": report("start")}
    stage_one(iterations)
    seen["stage 1"] = report("stage 1")
    stage_two(epochs)
    seen["stage 2"] = report("stage 2")
    print(f"{time.time() - began:.0f} s")
    return seen


if __name__ == "__main__":
    main()
