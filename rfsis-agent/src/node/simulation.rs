//! Two nodes, a LAN and a clock in one process: seeded delays, loss, cuts, crashes, and stalls
//! between any two steps of an agent. A failing seed is printed by proptest and replays.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;
use rfsis_common::maps::{NodeState, State};

use super::patience::START_WAIT;
use super::*;
use crate::cli::Role;

const MS: Nanos = 1_000_000;
const INTERVAL: Nanos = 10 * MS;
const GRACE: Nanos = 500 * MS;
const STEP: Nanos = MS / 4;

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}

/// What is wrong with the world. Rates are "one in n steps", 0 for never.
#[derive(Clone, Copy, Default)]
struct Trouble {
    stalls: u64,
    restarts: u64,
    loss: u64,
    max_delay: Nanos,
    /// Rounds of an agent in which it is told to hand over.
    handovers: u64,
}

/// A step of the edge. It may be stopped between a send and the report of it.
enum Todo {
    Act(Action),
    ReportSent(u64),
}

/// A host: the agent is a list of steps, each of which may be the last for a while.
struct Host {
    node: Node,
    kernel: NodeState,
    ring: VecDeque<(Nanos, Heartbeat)>,
    todo: VecDeque<Todo>,
    /// `now` of the running round: read, then drain, then tick.
    round: Option<Nanos>,
    stalled_until: Nanos,
    dead: bool,
    last_epoch: u64,
    takeovers: u32,
    yields: u32,
    /// To be told to hand over in its next round.
    hand_over: bool,
    offers: u32,
    /// After so many steps it stalls until a time.
    stall: Option<(usize, Nanos)>,
}

struct World {
    hosts: [Host; 2],
    wire: Vec<(Nanos, usize, Heartbeat)>,
    cut: bool,
    now: Nanos,
    rng: Rng,
    trouble: Trouble,
    missed: u32,
    roles: [Role; 2],
}

const fn lease(missed: u32) -> Nanos {
    INTERVAL * missed as u64 - INTERVAL / 2
}

fn address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, 1 + host as u8)
}

impl World {
    fn new(seed: u64, missed: u32, trouble: Trouble) -> Self {
        let mut rng = Rng(seed);
        let roles = [0, 1].map(|_| match rng.below(2) {
            0 => Role::Primary,
            _ => Role::Backup,
        });
        let hosts = [0, 1].map(|host| Host {
            node: boot(host, roles[host], missed, rng.next(), MS),
            kernel: NodeState::default(),
            ring: VecDeque::new(),
            todo: VecDeque::new(),
            round: None,
            stalled_until: 0,
            dead: false,
            last_epoch: 0,
            takeovers: 0,
            yields: 0,
            hand_over: false,
            offers: 0,
            stall: None,
        });
        Self {
            hosts,
            wire: Vec::new(),
            cut: false,
            now: MS,
            rng,
            trouble,
            missed,
            roles,
        }
    }

    fn takeover_time(&self) -> Nanos {
        INTERVAL * Nanos::from(self.missed)
    }

    fn open(&self, host: usize) -> bool {
        self.hosts[host].kernel.may_speak(self.now)
    }

    fn epochs(&self) -> [u64; 2] {
        [0, 1].map(|host| self.hosts[host].node.epoch())
    }

    /// Stalls an agent until a time, as soon as it has done so many steps more.
    fn stall_after(&mut self, host: usize, steps: usize, until: Nanos) {
        self.hosts[host].stall = Some((steps, until));
    }

    fn open_gates(&self) -> usize {
        usize::from(self.open(0)) + usize::from(self.open(1))
    }

    /// Runs for `time`; `check` after each step of each agent.
    fn run(&mut self, time: Nanos, mut check: impl FnMut(&World)) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            self.deliver();
            let first = self.rng.below(2) as usize;
            for host in [first, 1 - first] {
                if self.rng.one_in(self.trouble.restarts) && !self.hosts[host].dead {
                    self.restart(host);
                }
                while self.now >= self.hosts[host].stalled_until && self.step(host) {
                    self.deliver();
                    check(self);
                    if self.rng.one_in(self.trouble.stalls) {
                        let stall = self.rng.below(4 * self.takeover_time());
                        self.hosts[host].stalled_until = self.now + stall;
                    }
                }
            }
            check(self);
        }
    }

    /// A new agent on the same host. The kernel's state stays until the new one writes standby.
    fn restart(&mut self, host: usize) {
        let session = self.rng.next();
        let h = &mut self.hosts[host];
        h.node = boot(host, self.roles[host], self.missed, session, self.now);
        h.kernel = NodeState::default();
        h.todo.clear();
        h.round = None;
        h.last_epoch = 0;
    }

    fn deliver(&mut self) {
        let now = self.now;
        let hosts = &mut self.hosts;
        self.wire.retain(|&(at, to, heartbeat)| {
            if at <= now {
                hosts[to].ring.push_back((at, heartbeat));
            }
            at > now
        });
    }

    /// One step of an agent, as the edge does it; false if there is nothing to do now.
    fn step(&mut self, host: usize) -> bool {
        let now = self.now;
        let h = &mut self.hosts[host];
        if h.dead {
            return false;
        }
        if let Some((steps, until)) = &mut h.stall {
            match steps.checked_sub(1) {
                Some(left) => *steps = left,
                None => {
                    h.stalled_until = *until;
                    h.stall = None;
                    return false;
                }
            }
        }
        match h.todo.pop_front() {
            Some(Todo::Act(action)) => {
                self.act(host, action);
                return true;
            }
            Some(Todo::ReportSent(sequence)) => {
                self.feed_first(host, Event::HeartbeatSent { sequence });
                return true;
            }
            None => {}
        }
        let mut actions = Vec::new();
        match h.round {
            None if h.ring.is_empty() && now < h.node.next_wakeup() => return false,
            None => h.round = Some(now),
            Some(round) => match h.ring.pop_front() {
                Some((arrival, heartbeat)) => {
                    let event = Event::Heartbeat { heartbeat, arrival };
                    h.node.handle(event, round.max(arrival), &mut actions);
                }
                None => {
                    h.round = None;
                    if std::mem::take(&mut h.hand_over) || self.rng.one_in(self.trouble.handovers) {
                        h.node.handle(Event::HandOver, round, &mut actions);
                        h.offers += u32::from(h.node.state() == State::HandingOver);
                    }
                    h.node.handle(Event::Tick, round, &mut actions);
                    assert!(h.node.next_wakeup() > round, "a busy loop");
                }
            },
        }
        h.todo.extend(actions.into_iter().map(Todo::Act));
        assert!(h.node.epoch() >= h.last_epoch, "the epoch fell");
        h.last_epoch = h.node.epoch();
        true
    }

    fn act(&mut self, host: usize, action: Action) {
        let now = self.now;
        let h = &mut self.hosts[host];
        match action {
            Action::SetState {
                state, lease_until, ..
            } => {
                h.kernel = NodeState {
                    state: state as u64,
                    lease_ns: lease_until,
                }
            }
            Action::RenewLease { until } => h.kernel.lease_ns = until,
            Action::SendHeartbeat { heartbeat, .. } if h.node.is_stale(&heartbeat, now) => {}
            Action::SendHeartbeat { heartbeat, .. } => {
                let sequence = heartbeat.sequence;
                if !self.cut && !self.rng.one_in(self.trouble.loss) {
                    let at = now + self.rng.below(self.trouble.max_delay);
                    self.wire.push((at, 1 - host, heartbeat));
                }
                h.todo.push_front(Todo::ReportSent(sequence));
            }
            Action::TakeOver { .. } => {
                h.takeovers += 1;
                self.feed_first(host, Event::TakeoverDone);
            }
            Action::Yield { .. } => h.yields += 1,
            Action::Announce | Action::Wished(_) | Action::Count(_) | Action::Report(_) => {}
        }
    }

    /// What the event leads to is done before what was to be done already.
    fn feed_first(&mut self, host: usize, event: Event) {
        let mut actions = Vec::new();
        let h = &mut self.hosts[host];
        h.node.handle(event, self.now, &mut actions);
        for action in actions.into_iter().rev() {
            h.todo.push_front(Todo::Act(action));
        }
    }
}

fn boot(host: usize, role: Role, missed: u32, session: u64, now: Nanos) -> Node {
    let config = NodeConfig {
        role,
        node: address(host),
        peer: address(1 - host),
        mac: [2, 0, 0, 0, 0, host as u8],
        tap_mac: [2, 0, 0, 0, 0, host as u8],
        interval: Duration::from_nanos(INTERVAL),
        missed,
        lease: Duration::from_nanos(lease(missed)),
        startup_grace: Duration::from_nanos(GRACE),
        session: session | 1,
    };
    Node::new(config, now)
}

fn exclusive(world: &World) {
    assert!(
        world.open_gates() < 2,
        "both gates open at {} ms: {:#?} {:#?}",
        world.now / MS,
        world.hosts[0].node,
        world.hosts[1].node
    );
}

proptest! {
    // More by PROPTEST_CASES.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(1000)))]

    /// The safety of the whole design: see the proof on the module.
    #[test]
    fn gates_are_never_both_open_whatever_stalls_and_restarts(
        seed: u64, missed in 2u32..6, stalls in 20u64..2_000, restarts in prop_oneof![Just(0u64), 500u64..5_000],
        handovers in prop_oneof![Just(0u64), 2u64..200],
    ) {
        let mut world = World::new(seed, missed, Trouble { stalls, restarts, handovers, ..Trouble::default() });
        world.run(5_000 * MS, exclusive);
        // Not bought by silence: when the trouble ends, one speaks.
        world.trouble = Trouble::default();
        world.run(4 * world.takeover_time() + 2 * GRACE + START_WAIT, exclusive);
        world.run(100 * MS, |w| assert_eq!(w.open_gates(), 1));
    }

    #[test]
    fn exactly_one_is_active_soon_after_any_partition_heals(
        seed: u64, missed in 2u32..6, cut_for in 0u64..2_000, max_delay in 0..2 * INTERVAL,
    ) {
        let mut world = World::new(seed, missed, Trouble { max_delay, ..Trouble::default() });
        world.run(1_500 * MS, |_| {});
        world.cut = true;
        world.run(cut_for * MS, |_| {});
        world.cut = false;
        world.run(3 * INTERVAL + max_delay, |_| {});
        // A delay of up to two intervals exceeds a deadline of two: then the VIP may move, but
        // never be with both for longer than the same bound.
        let mut both_since = None;
        let bound = 3 * INTERVAL + max_delay;
        world.run(1_000 * MS, |w| {
            match (w.open_gates(), both_since) {
                (2, None) => both_since = Some(w.now),
                (2, Some(since)) => assert!(w.now - since <= bound),
                _ => both_since = None,
            }
            if Nanos::from(missed - 1) * INTERVAL > max_delay + INTERVAL / 2 {
                assert_eq!(w.open_gates(), 1);
            }
        });
    }

    #[test]
    fn the_survivor_is_active_in_time_whenever_the_other_dies(
        seed: u64, missed in 2u32..6, die_at in 0u64..3_000, victim in 0usize..2,
        loss in prop_oneof![Just(0u64), 10u64..100], stalls in prop_oneof![Just(0u64), 50u64..2_000],
    ) {
        let mut world = World::new(seed, missed, Trouble { loss, stalls, ..Trouble::default() });
        world.run(die_at * MS, |_| {});
        world.hosts[victim].dead = true;
        world.trouble = Trouble::default();
        let stalled = world.hosts[1 - victim].stalled_until.saturating_sub(world.now);
        let own_lease = lease(missed);
        world.run(stalled + own_lease + world.takeover_time() + GRACE.max(START_WAIT) + 2 * INTERVAL, |_| {});
        world.run(200 * MS, |w| assert!(w.open(1 - victim)));
    }

    /// Loss, delay, stalls and restarts at once: no panic, epochs grow, and it settles.
    #[test]
    fn any_mix_of_trouble_settles_on_one(
        seed: u64, missed in 2u32..6, stalls in 20u64..2_000, restarts in 500u64..5_000,
        loss in 2u64..50, max_delay in 0..2 * INTERVAL, handovers in 2u64..200,
    ) {
        let trouble = Trouble { stalls, restarts, loss, max_delay, handovers };
        let mut world = World::new(seed, missed, trouble);
        world.run(3_000 * MS, |_| {});
        world.trouble = Trouble::default();
        world.run(8 * world.takeover_time() + 2 * GRACE + START_WAIT, |_| {});
        let calm: Vec<_> = world.hosts.iter().map(|h| h.takeovers).collect();
        world.run(500 * MS, |w| assert_eq!(w.open_gates(), 1));
        prop_assert_eq!(calm, world.hosts.iter().map(|h| h.takeovers).collect::<Vec<_>>());
    }

    /// A stalled standby finds the offer, and behind it that it was taken back: it must not take it. And
    /// where the standby was only slow, the VIP is with one node when it has woken up.
    #[test]
    fn an_offer_that_meets_a_stall_of_any_length_leaves_one_gate_open(
        seed: u64, missed in 2u32..6, before in 0u64..40, stall in 0u64..400, steps in 1usize..12,
    ) {
        let mut world = World::new(seed, missed, Trouble::default());
        world.run(1_000 * MS + before * STEP, exclusive);
        let active = usize::from(world.open(1));
        let standby = 1 - active;
        world.hosts[active].hand_over = true;
        // Anywhere between two steps: before it hears of it, or with the decision half done.
        world.stall_after(standby, steps, world.now + stall * MS / 2);
        world.run((200 + stall) * MS, exclusive);
        let takeover_time = world.takeover_time();
        world.run(4 * takeover_time, exclusive);
        world.run(100 * MS, |w| assert_eq!(w.open_gates(), 1));
        prop_assert_eq!(world.hosts[active].offers, 1);
    }

    /// Whoever dies, at whichever step of a handover, the other serves within the usual time.
    #[test]
    fn a_death_at_any_step_of_a_handover_leaves_the_survivor_active(
        seed: u64, missed in 2u32..6, before in 0u64..40, steps in 0usize..30, victim in 0usize..2,
    ) {
        let mut world = World::new(seed, missed, Trouble::default());
        world.run(1_000 * MS + before * STEP, exclusive);
        let active = usize::from(world.open(1));
        let victim = if victim == 0 { active } else { 1 - active };
        world.hosts[active].hand_over = true;
        world.stall_after(victim, steps, Nanos::MAX);
        let patience = lease(missed) + 2 * world.takeover_time() + 2 * INTERVAL;
        // It may never come to so many steps.
        world.run(patience + 100 * MS, exclusive);
        world.hosts[victim].stalled_until = Nanos::MAX;
        world.run(patience, exclusive);
        world.run(100 * MS, |w| assert!(w.open(1 - victim)));
    }
}

#[test]
fn in_peace_a_handover_moves_the_vip_at_once_and_nobody_claims() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Trouble::default());
        world.run(1_000 * MS + seed * STEP, exclusive);
        for round in 1..=4 {
            let (from, epochs) = (usize::from(world.open(1)), world.epochs());
            world.hosts[from].hand_over = true;
            let (mut closed_at, mut silent) = (None, 0);
            world.run(50 * MS, |w| {
                exclusive(w);
                match (w.open_gates(), closed_at) {
                    (0, None) => closed_at = Some(w.now),
                    (0, Some(at)) => silent = silent.max(w.now - at),
                    _ => closed_at = None,
                }
            });
            assert!(world.open(1 - from), "round {round}");
            // The agents of this world look four times a millisecond.
            assert!(silent <= 2 * STEP, "{silent} ns without an open gate");
            assert_eq!(world.epochs(), epochs.map(|epoch| epoch + 1), "a claim");
            assert_eq!(world.hosts[from].node.state(), State::Standby);
        }
    }
}

/// The standby dies in the same moment: all goes on with the epoch of before.
#[test]
fn an_offer_that_nobody_takes_is_taken_back() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Trouble::default());
        world.run(1_000 * MS + seed * STEP, exclusive);
        let active = usize::from(world.open(1));
        let (epoch, takeovers) = (
            world.hosts[active].node.epoch(),
            world.hosts[active].takeovers,
        );
        world.hosts[1 - active].dead = true;
        world.hosts[active].hand_over = true;
        world.run(30 * MS, |_| {});
        assert_eq!(world.hosts[active].offers, 1);
        world.run(lease(3) + 2 * INTERVAL, exclusive);
        world.run(200 * MS, |w| assert!(w.open(active)));
        let host = &world.hosts[active];
        assert_eq!((host.node.epoch(), host.takeovers), (epoch, takeovers));
        assert_eq!(host.yields, 0, "its connections were given up");
    }
}

#[test]
fn in_peace_one_takes_over_once_and_its_gate_never_closes() {
    for seed in 0..20 {
        for missed in 2..5 {
            let mut world = World::new(seed, missed, Trouble::default());
            world.run(GRACE + START_WAIT + 100 * MS, exclusive);
            world.run(2_000 * MS, |w| assert_eq!(w.open_gates(), 1));
            assert_eq!(world.hosts.iter().map(|h| h.takeovers).sum::<u32>(), 1);
        }
    }
}

/// The standby's own sleep is not the active's death: what it missed is in its ring.
#[test]
fn a_stalled_standby_does_not_take_over() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Trouble::default());
        world.run(1_000 * MS, exclusive);
        let standby = usize::from(world.open(0));
        world.hosts[standby].stalled_until = world.now + 300 * MS + seed * MS;
        world.run(1_000 * MS, |w| assert!(w.open(1 - standby)));
        assert_eq!(world.hosts[standby].takeovers, 0);
    }
}

/// SIGSTOP for a second, then SIGCONT.
#[test]
fn a_stopped_active_comes_back_as_standby() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Trouble::default());
        world.run(1_000 * MS, exclusive);
        let active = usize::from(world.open(1));
        world.hosts[active].stalled_until = world.now + 1_000 * MS;
        world.run(50 * MS, exclusive);
        world.run(2_000 * MS, |w| {
            assert!(w.open(1 - active) && !w.open(active))
        });
        assert_eq!(world.hosts[active].node.state(), State::Standby);
        assert_eq!(world.hosts[active].yields, 1);
    }
}

/// A stall between the lease and the takeover time costs a pause, not the VIP.
#[test]
fn an_active_that_slept_past_its_lease_only_resumes() {
    for phase in 0..20 {
        let mut world = World::new(7, 3, Trouble::default());
        world.run(1_000 * MS + phase * STEP, exclusive);
        let active = usize::from(world.open(1));
        world.hosts[active].stalled_until = world.now + 28 * MS;
        world.run(35 * MS, exclusive);
        world.run(500 * MS, |w| assert_eq!(w.open_gates(), 1));
        let survivor = usize::from(world.open(1));
        // The stall began up to one interval after the last heartbeat.
        let slept_too_long = survivor != active;
        assert_eq!(slept_too_long, world.hosts[1 - active].takeovers == 1);
    }
}
