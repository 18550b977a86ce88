//! What happens in a run: data, made of a seed up front. So it can be printed, and made smaller.

use std::fmt;

use super::*;

/// A node by what it is when the trouble begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// Whose gate is open, or was last.
    Active,
    /// The other.
    Standby,
}

/// An end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Client,
    Machine(usize),
}

/// What goes wrong. Times in ns, rates per mille.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The agent is killed, and started again.
    Kill { who: Who, back: Nanos },
    /// The machine loses its power, and gets it back.
    Reboot { who: Who, back: Nanos },
    /// The agent does not run, after so many steps of its heartbeat thread.
    Pause { who: Who, steps: u32, time: Nanos },
    /// Its shadow thread does not.
    Stall { who: Who, time: Nanos },
    /// The machine's cable is pulled, and plugged in again: its interface shows that.
    Unplug { who: Who, time: Nanos },
    /// Nothing gets through, one way.
    Cut { from: Place, to: Place, time: Nanos },
    /// Packets between client and VIP, copies, datagrams of the sync channel, heartbeats get lost.
    Lose { what: Lost, rate: u64, time: Nanos },
    /// The VIP is handed over.
    Switchover,
    /// Somebody sends again what the nodes have told each other.
    Replay { count: u64 },
}

/// What gets lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Packets,
    Copies,
    Datagrams,
    Heartbeats,
}

impl Trouble {
    /// For how long it goes on by itself, ns.
    pub(crate) fn time(&self) -> Nanos {
        match *self {
            Trouble::Kill { back, .. } | Trouble::Reboot { back, .. } => back,
            Trouble::Pause { time, .. }
            | Trouble::Stall { time, .. }
            | Trouble::Unplug { time, .. }
            | Trouble::Cut { time, .. }
            | Trouble::Lose { time, .. } => time,
            Trouble::Switchover | Trouble::Replay { .. } => 0,
        }
    }

    /// Whether heartbeats may not arrive: then two nodes may be active for a while.
    pub(crate) fn splits(&self) -> bool {
        match self {
            Trouble::Cut { from, to, .. } => {
                matches!((from, to), (Place::Machine(_), Place::Machine(_)))
            }
            Trouble::Lose { what, .. } => *what == Lost::Heartbeats,
            _ => false,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Nanos| time as f64 / MS as f64;
        match *self {
            Trouble::Kill { who, back } => {
                write!(
                    f,
                    "kill the agent of the {who:?}, start it after {} ms",
                    ms(back)
                )
            }
            Trouble::Reboot { who, back } => {
                write!(f, "reboot the {who:?}, up after {} ms", ms(back))
            }
            Trouble::Pause { who, steps, time } => write!(
                f,
                "stop the agent of the {who:?} after {steps} steps, for {} ms",
                ms(time)
            ),
            Trouble::Stall { who, time } => write!(
                f,
                "stop the shadow thread of the {who:?} for {} ms",
                ms(time)
            ),
            Trouble::Unplug { who, time } => {
                write!(f, "unplug the {who:?} for {} ms", ms(time))
            }
            Trouble::Cut { from, to, time } => {
                write!(f, "cut {from:?} -> {to:?} for {} ms", ms(time))
            }
            Trouble::Lose { what, rate, time } => {
                write!(f, "lose {rate} of 1000 {what:?} for {} ms", ms(time))
            }
            Trouble::Switchover => write!(f, "switchover"),
            Trouble::Replay { count } => write!(f, "replay {count} messages"),
        }
    }
}

/// A connection, and when its client opens it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opens {
    /// The client's.
    pub(crate) port: u16,
    pub(crate) at: Nanos,
    pub(crate) plan: Plan,
    pub(crate) tweaks: Tweaks,
}

/// The LAN without trouble. Rates per mille, jitter in ns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lan {
    pub(crate) loss: u64,
    pub(crate) duplicates: u64,
    /// Segments with data of which a second copy begins in the middle.
    pub(crate) overlaps: u64,
    pub(crate) jitter: Nanos,
    pub(crate) copy_loss: u64,
    pub(crate) copy_jitter: Nanos,
    pub(crate) datagram_loss: u64,
}

/// A whole run.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) terms: Terms,
    pub(crate) lan: Lan,
    pub(crate) adopts: bool,
    pub(crate) opens: Vec<Opens>,
    pub(crate) troubles: Vec<(Nanos, Trouble)>,
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Terms { setup, .. } = self.terms;
        writeln!(
            f,
            "seed {}: protect {}, tap {}, heartbeats every {} ms, {} missed, shadows {} adopted",
            self.seed,
            if setup.sync { "sync" } else { "async" },
            if setup.mirror { "mirror" } else { "lan" },
            self.terms.interval / MS,
            self.terms.missed,
            if self.adopts { "are" } else { "are not" },
        )?;
        writeln!(f, "  {:?}", self.lan)?;
        for (index, opens) in self.opens.iter().enumerate() {
            let Plan {
                service,
                upload,
                want,
                ending,
                ..
            } = opens.plan;
            writeln!(
                f,
                "  client {index} at {:.3} ms: port {service}, sends {upload}, wants {want}, {ending:?}",
                opens.at as f64 / MS as f64
            )?;
        }
        for (index, (at, trouble)) in self.troubles.iter().enumerate() {
            writeln!(
                f,
                "  trouble {index} at {:.3} ms: {trouble}",
                *at as f64 / MS as f64
            )?;
        }
        Ok(())
    }
}

/// When the first client opens, ns: by then one node is active, and the other has its word.
const FIRST: Nanos = 150 * MS;

impl Scenario {
    /// The scenario of a seed.
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = Rng(seed ^ 0x7266_7369_7300_0000);
        let interval = rng.pick(&[10 * MS, 10 * MS, 20 * MS]);
        let missed = 2 + rng.below(3) as u32;
        let takeover_time = interval * Nanos::from(missed);
        let terms = Terms {
            setup: Setup {
                sync: rng.below(4) > 0,
                mirror: rng.below(3) > 0,
            },
            interval,
            missed,
            timeout: rng.pick(&[takeover_time, 3 * takeover_time]),
            memory: rng.pick(&[256 << 20, 256 << 20, 256 << 20, 16 << 10]),
            latency: rng.pick(&[0, 20_000, 200_000]),
            // Not drawn: older seeds would be other histories.
            pledged_from: [0, 0, 3_000, u64::MAX][seed as usize % 4],
        };
        let rough = rng.pick(&[0, 0, 5, 40]);
        let mut up_to = |most: u64| rng.below(most + 1);
        let lan = Lan {
            loss: up_to(rough),
            duplicates: up_to(rough),
            overlaps: up_to(rough),
            jitter: up_to(4) * up_to(100_000),
            copy_loss: up_to(rough),
            copy_jitter: if up_to(3) == 0 { up_to(300_000) } else { 0 },
            datagram_loss: up_to(rough),
        };
        let adopts = rng.below(4) > 0;
        let again = rng.below(3) == 0;
        let mut troubles = troubles(&mut rng, takeover_time, again);
        troubles.extend(unplugged(seed, takeover_time));
        troubles.sort_by_key(|(at, _)| *at);
        // Each service has the same buffers for all.
        let buffer = 2048 << rng.below(8);
        let count = 1 + rng.below(4);
        let opens = (0..count)
            .map(|index| {
                let (trouble, _) = rng.pick(&troubles);
                opens(index as u16, trouble, buffer, again, &mut rng)
            })
            .collect();
        Self {
            seed,
            terms,
            lan,
            adopts,
            opens,
            troubles,
        }
    }

    /// When the last trouble is over, ns.
    pub(crate) fn calm_at(&self) -> Nanos {
        let ends = self.troubles.iter().map(|(at, what)| at + what.time());
        ends.max().unwrap_or(0)
    }
}

/// Of the dice for cables.
const UNPLUGGED: u64 = 0x756e_706c_7567_000c;

/// A first sequence number: perhaps one that soon wraps around, perhaps the stack's own.
fn wrapping(rng: &mut Rng) -> Option<u32> {
    match rng.below(3) {
        0 => Some((rng.below(1 << 12) as u32).wrapping_neg()),
        1 => Some(rng.next() as u32),
        _ => None,
    }
}

/// What goes wrong, one after the other; or `again` and again, as it may when a node is restarted, takes over its
/// flows, and then the other fails.
fn troubles(rng: &mut Rng, takeover_time: Nanos, again: bool) -> Vec<(Nanos, Trouble)> {
    let mut at = FIRST;
    let mut troubles = vec![];
    for index in 0..1 + rng.below(4) {
        at += rng.pick(&[MS, 20 * MS, 200 * MS, 600 * MS]) * (1 + rng.below(999)) / 1000;
        let what = if again && index < 3 {
            let first = rng.pick(&[Who::Active, Who::Standby]);
            Trouble::Kill {
                who: if index == 0 { first } else { Who::Active },
                back: MS + rng.below(20) * MS,
            }
        } else {
            trouble(rng, takeover_time)
        };
        troubles.push((at, what));
        if again {
            at += takeover_time + rng.below(1500) * MS;
        }
    }
    troubles
}

/// A cable that is pulled besides, in one of eight scenarios; perhaps the active dies while its standby's is. By dice
/// of their own, and none of those that the regressions are about.
fn unplugged(seed: u64, takeover_time: Nanos) -> Vec<(Nanos, Trouble)> {
    let mut rng = Rng(seed ^ UNPLUGGED);
    if rng.below(8) > 0 {
        return vec![];
    }
    let at = FIRST + rng.pick(&[20, 200, 2000]) * MS * (1 + rng.below(1000)) / 1000;
    let who = rng.pick(&[Who::Active, Who::Standby, Who::Standby]);
    let time = rng.pick(&[1, 2, 4, 16]) * takeover_time * (1 + rng.below(1000)) / 1000 + MS;
    let mut troubles = vec![(at, Trouble::Unplug { who, time })];
    if who == Who::Standby && rng.below(2) == 0 {
        let after = rng.below(time);
        let death = Trouble::Kill {
            who: Who::Active,
            back: time - after + 4 * takeover_time,
        };
        troubles.push((at + after, death));
    }
    troubles
}

/// A connection that is open when this trouble comes, or about to be; `lasts`: until the last one.
fn opens(index: u16, trouble: Nanos, active_buffer: usize, lasts: bool, rng: &mut Rng) -> Opens {
    let before = rng.pick(&[MS, 30 * MS, 400 * MS]);
    let at = (trouble + MS / 2)
        .saturating_sub(rng.below(before))
        .max(FIRST - 50 * MS);
    let size = 1 << rng.below(14);
    let plan = match rng.below(13) {
        0 | 1 => Plan::echo(size),
        2 | 3 => Plan::echo(size).half_close(),
        4 | 5 => Plan::chargen(size),
        6 | 7 => Plan::discard(size),
        8 | 9 => Plan {
            turns: true,
            ..Plan::echo(size)
        },
        10 => Plan::daytime(at + rng.below(200) * MS),
        // A short one.
        _ => Plan::echo(1 + rng.below(64)),
    };
    let part = 1 + (size as usize >> rng.below(6));
    let pause = if lasts {
        (30 + rng.below(100)) * MS
    } else {
        (1 + rng.below(30)) * MS
    };
    let plan = match rng.below(7) {
        0 => plan.slow(part, pause),
        1..=3 => plan.typed(part, pause),
        4 => Plan {
            reads_from: at + rng.below(800) * MS,
            ..plan
        },
        _ if lasts => plan.slow(part, pause).typed(part, pause),
        _ => plan,
    };
    Opens {
        port: 40_000 + index,
        at,
        plan,
        tweaks: Tweaks {
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_isn: wrapping(rng),
            active_isn: wrapping(rng),
            client_buffer: 1024 << rng.below(6),
            active_buffer,
        },
    }
}

fn trouble(rng: &mut Rng, takeover_time: Nanos) -> Trouble {
    let who = rng.pick(&[Who::Active, Who::Active, Who::Standby]);
    let back = rng.pick(&[MS, takeover_time, 10 * takeover_time]);
    let back = back * (1 + rng.below(1000)) / 1000 + MS;
    let time = rng.pick(&[1, 2, 4, 8]) * takeover_time * (1 + rng.below(1000)) / 2000 + MS;
    let machine = rng.below(2) as usize;
    match rng.below(20) {
        0..=5 => Trouble::Kill { who, back },
        6 | 7 => Trouble::Reboot {
            who,
            back: back + 2 * takeover_time,
        },
        8..=10 => Trouble::Pause {
            who,
            steps: rng.below(12) as u32,
            time,
        },
        11 => Trouble::Stall { who, time },
        12 => {
            let (from, to) = rng.pick(&[
                (Place::Client, Place::Machine(machine)),
                (Place::Machine(machine), Place::Client),
                (Place::Machine(machine), Place::Machine(1 - machine)),
            ]);
            Trouble::Cut { from, to, time }
        }
        13..=15 => Trouble::Lose {
            what: rng.pick(&[
                Lost::Packets,
                Lost::Copies,
                Lost::Copies,
                Lost::Datagrams,
                Lost::Datagrams,
                Lost::Heartbeats,
            ]),
            rate: rng.pick(&[100, 500, 1000]),
            time,
        },
        16..=18 => Trouble::Switchover,
        _ => Trouble::Replay {
            count: 1 + rng.below(20),
        },
    }
}
