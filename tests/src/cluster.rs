//! A pair that is broken and repaired, again and again: which node is active changes each time.

use std::fmt;
use std::time::{Duration, Instant};

use crate::agent::{Agent, Pair, Settings};
use crate::client::Noise;
use crate::lab::{Host, Lab};
use crate::patience::wait_at_most;

/// How the active node stops being it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failover {
    /// `kill -9` of its agent, which is started anew once the other has taken over.
    Kill9,
    /// `kill -STOP`, and `kill -CONT` once the other has taken over.
    Hang,
    /// Its cable is pulled, and plugged in again once the other has taken over.
    LinkCut,
    /// Asked for.
    Switchover,
}

impl Failover {
    /// All ways.
    pub const ALL: [Failover; 4] = [
        Failover::Kill9,
        Failover::Hang,
        Failover::LinkCut,
        Failover::Switchover,
    ];

    /// `count` of them, each way as often as the others or once more, in an order that the seed gives.
    pub fn shuffled(count: usize, seed: u64) -> Vec<Failover> {
        let mut noise = Noise::new(seed);
        let mut below = |most: usize| {
            let mut bytes = [0; 8];
            noise.fill(&mut bytes);
            (u64::from_le_bytes(bytes) >> 16) as usize % most
        };
        let mut ways: Vec<_> = Self::ALL.into_iter().cycle().take(count).collect();
        for at in (1..ways.len()).rev() {
            ways.swap(at, below(at + 1));
        }
        ways
    }
}

/// A seed: `RFSIS_TEST_SEED`, or another each time. Print it.
///
/// # Panics
/// When it is set to something other than a number.
pub fn seed() -> u64 {
    match std::env::var("RFSIS_TEST_SEED") {
        Ok(text) => match text.parse() {
            Ok(seed) => seed,
            Err(error) => panic!("RFSIS_TEST_SEED is {text:?}: {error}"),
        },
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64),
    }
}

/// Two agents and which of them is active.
#[derive(Debug)]
pub struct Cluster<'lab> {
    lab: &'lab Lab,
    settings: Settings,
    /// On nodes a and b.
    agents: [Agent; 2],
    /// Index of the active.
    active: usize,
}

/// What one failover was like.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// When the active was broken.
    pub broken: Instant,
    /// When it was there again: started, woken, plugged in.
    pub back: Instant,
}

impl<'lab> Cluster<'lab> {
    /// Node a is active, node b standby.
    ///
    /// # Panics
    /// When they do not get there.
    pub fn start(lab: &'lab Lab, settings: &Settings) -> Self {
        let Pair { primary, backup } = Pair::start(lab, settings);
        Self {
            lab,
            settings: settings.clone(),
            agents: [primary, backup],
            active: 0,
        }
    }

    /// The node that is active now.
    pub fn active(&self) -> &Agent {
        &self.agents[self.active]
    }

    /// The other.
    pub fn standby(&self) -> &Agent {
        &self.agents[1 - self.active]
    }

    /// Kills the active's agent. The other is the active from now on.
    ///
    /// # Panics
    /// When it does not end.
    pub fn kill_active(&mut self) -> Instant {
        let killed = self.active().kill9();
        self.agents[self.active].await_exit();
        self.active = 1 - self.active;
        killed
    }

    /// Kills the standby's agent.
    ///
    /// # Panics
    /// When it does not end.
    pub fn kill_standby(&mut self) {
        self.standby().kill9();
        self.agents[1 - self.active].await_exit();
    }

    /// Starts the standby's agent, which was killed.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_standby(&mut self) -> Instant {
        let at = 1 - self.active;
        let (host, role) = [(Host::A, "primary"), (Host::B, "backup")][at];
        self.agents[at] = Agent::start(self.lab, host, role, &self.settings);
        Instant::now()
    }

    /// Kills both agents, and starts both. Whichever becomes active, all connections are gone.
    ///
    /// # Panics
    /// When they do not get there.
    pub fn restart_both(&mut self) {
        for agent in &mut self.agents {
            agent.kill9();
            agent.await_exit();
        }
        for _ in 0..2 {
            self.start_standby();
            self.active = 1 - self.active;
        }
        let active = || {
            let active = self.agents.iter().position(is_active);
            active.filter(|&at| !is_active(&self.agents[1 - at]))
        };
        let active = wait_at_most(
            Duration::from_secs(20),
            "one active node",
            active,
            Option::is_some,
        );
        self.active = active.unwrap_or_default();
    }

    /// Breaks the active in this way, and repairs it once the other has taken over.
    ///
    /// # Panics
    /// When the other does not take over.
    pub fn fail_over(&mut self, how: Failover) -> Turn {
        let host = self.active().host();
        let broken = match how {
            Failover::Kill9 => self.kill_active(),
            Failover::Hang => {
                let broken = self.active().stop();
                self.active = 1 - self.active;
                broken
            }
            Failover::LinkCut => {
                let broken = Instant::now();
                self.lab.cut(host);
                self.active = 1 - self.active;
                broken
            }
            Failover::Switchover => {
                let broken = Instant::now();
                let switched = self.switch_over();
                assert_eq!(switched, Ok(()));
                broken
            }
        };
        self.active().wait_state("active");
        let back = match how {
            Failover::Kill9 => self.start_standby(),
            Failover::Hang => {
                self.standby().cont();
                Instant::now()
            }
            Failover::LinkCut => {
                self.lab.mend(host);
                Instant::now()
            }
            Failover::Switchover => broken,
        };
        Turn { broken, back }
    }

    /// Asks the active for a switchover.
    ///
    /// # Errors
    /// Its reason, if it refuses.
    pub fn switch_over(&mut self) -> Result<(), String> {
        let output = self.active().ask(&["switchover"]);
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        self.active = 1 - self.active;
        Ok(())
    }

    /// Waits until a standby guards so many connections, and that is all of them. Returns when it was so.
    ///
    /// # Panics
    /// When that does not come within `limit`.
    #[track_caller]
    pub fn wait_redundant(&self, flows: u64, limit: Duration) -> Instant {
        let look = || {
            let [active, standby] = [self.active(), self.standby()].map(Agent::status);
            Redundancy {
                active: active.unwrap_or_default(),
                standby: standby.unwrap_or_default(),
            }
        };
        wait_at_most(
            limit,
            "full redundancy",
            look,
            |Redundancy { active, standby }| {
                let guarded = &active["protection"]["guarded"];
                active["state"] == "active"
                    && standby["state"] == "standby"
                    && *guarded == flows
                    && standby["flows"]["lockstep"] == flows
                    && [active, standby]
                        .iter()
                        .all(|status| status["ready"] == true && status["at_risk"] == 0)
            },
        );
        Instant::now()
    }
}

fn is_active(agent: &Agent) -> bool {
    agent
        .status()
        .is_some_and(|status| status["state"] == "active")
}

/// What both nodes say of it.
struct Redundancy {
    active: serde_json::Value,
    standby: serde_json::Value,
}

impl fmt::Debug for Redundancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "active {}, standby {}", self.active, self.standby)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_comes_as_often_and_the_seed_gives_the_order() {
        let ways = Failover::shuffled(200, 7);
        for way in Failover::ALL {
            assert_eq!(ways.iter().filter(|&&w| w == way).count(), 50);
        }
        assert_eq!(ways, Failover::shuffled(200, 7));
        assert_ne!(ways, Failover::shuffled(200, 8));
    }
}
