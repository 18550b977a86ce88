//! Two agents that have found their states, and runs that count only if they kept them.
//!
//! With deadlines of milliseconds on a busy machine the nodes may change places at any time, which
//! costs no connection and is no fault, but a run in which it happened measures something else.

use anyhow::{Result, ensure};
use tests::{Agent, Host, Lab, Pair, Settings};

/// How many runs may be void before the measurement is.
pub const VOID_MOST: usize = 20;

/// Both agents started; the active is called primary, the standby backup, whichever they are.
pub fn pair(lab: &Lab, settings: &Settings) -> Pair {
    let primary = Agent::start(lab, Host::A, "primary", settings);
    let backup = Agent::start(lab, Host::B, "backup", settings);
    let (primary, backup) = Pair { primary, backup }.by_state();
    for agent in [&primary, &backup] {
        agent.wait_status("ready", |status| status["ready"] == true);
    }
    Pair { primary, backup }
}

/// Whether an agent is standby now.
pub fn is_standby(agent: &Agent) -> bool {
    agent
        .status()
        .is_some_and(|status| status["state"] == "standby")
}

/// Rises whenever the VIP changes hands; `None` from an agent that does not answer.
pub fn epoch(agent: &Agent) -> Option<u64> {
    agent.status()?["epoch"].as_u64()
}

/// The outcome of the first run that is not void; `void` counts those that were.
pub fn valid<T>(void: &mut usize, run: impl Fn() -> Result<Option<T>>) -> Result<T> {
    loop {
        if let Some(outcome) = run()? {
            return Ok(outcome);
        }
        *void += 1;
        ensure!(
            *void <= VOID_MOST,
            "in {void} runs the nodes changed places: this machine is too busy to measure on"
        );
    }
}
