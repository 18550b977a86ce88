//! What two agents cost while nothing happens.

use std::time::Duration;

use anyhow::Result;
use tests::report::{Figure, row, table};
use tests::{Lab, Settings};

use crate::process::cpu_time;
use crate::settled::pair;

/// How long the agents are watched.
const WATCH: Duration = Duration::from_secs(10);

pub fn measure(_runs: usize) -> Result<Vec<Figure>> {
    println!("### CPU of an idle agent, over {} s\n", WATCH.as_secs());
    let mut rows = vec![row(["heartbeats", "active", "standby"])];
    let mut figures = Vec::new();
    for (interval, missed) in [("10ms", 3), ("1ms", 3)] {
        let lab = Lab::build(&Default::default())?;
        let pair = pair(&lab, &Settings::heartbeat(interval, missed));
        let agents = [&pair.primary, &pair.backup];
        let before = agents.map(cpu_time);
        std::thread::sleep(WATCH);
        let mut shares = Vec::new();
        for (agent, before) in agents.into_iter().zip(before) {
            let used = cpu_time(agent)?.saturating_sub(before?);
            let share = 100.0 * used.as_secs_f64() / WATCH.as_secs_f64();
            shares.push(format!("{share:.1} %"));
        }
        figures.push(Figure::told(
            format!("CPU of an idle agent at {interval} heartbeats, of one core: active, standby"),
            shares.join(", "),
        ));
        rows.push([vec![interval.to_owned()], shares].concat());
    }
    println!("{}", table(&rows));
    Ok(figures)
}
