//! How long a client waits when the primary dies.

use std::time::Duration;

use anyhow::{Context, Result};
use tests::pulse::Pulse;
use tests::report::{Figure, millis, row, spread, table};
use tests::{Death, Lab, Settings};

use crate::settled::{is_standby, pair, valid};

/// Heartbeats, how many may be missed, and the longest median allowed.
const HEARTBEATS: [(&str, u32, Duration); 2] = [
    ("10ms", 3, Duration::from_millis(33)),
    ("1ms", 3, Duration::from_millis(10)),
];
const DEATHS: [(&str, Death); 2] = [("link cut", Death::LinkCut), ("kill -9", Death::Kill9)];
/// Echoes before the death and after the takeover.
const STEADY: u64 = 300;

/// A blackout as long as this wants an explanation.
const FAR_OFF: Duration = Duration::from_millis(200);

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    println!("### Longest gap between echoes of a live connection at 1 kHz, {runs} runs each\n");
    let mut rows = vec![row([
        "heartbeats",
        "death",
        "median",
        "least",
        "greatest",
        "target",
        "void runs",
    ])];
    let mut figures = Vec::new();
    for (interval, missed, target) in HEARTBEATS {
        let settings = Settings::heartbeat(interval, missed);
        for (name, death) in DEATHS {
            let (mut gaps, mut void) = (Vec::new(), 0);
            for _ in 0..runs {
                gaps.push(valid(&mut void, || blackout(&settings, death))?);
            }
            let (median, least, greatest) = spread(&gaps);
            let heartbeats = format!("{interval} × {missed}");
            figures.push(Figure::at_most(
                format!("blackout at {heartbeats}, {name}, median"),
                median,
                target,
                millis,
            ));
            let target = format!("≤ {}", millis(target));
            let [median, least, greatest] = [median, least, greatest].map(millis);
            let name = name.to_owned();
            let void = void.to_string();
            rows.push(vec![
                heartbeats, name, median, least, greatest, target, void,
            ]);
        }
    }
    println!("{}", table(&rows));
    Ok(figures)
}

/// The longest gap across a death of the primary; `None` if it was the active no more.
fn blackout(settings: &Settings, death: Death) -> Result<Option<Duration>> {
    let lab = Lab::build(&Default::default())?;
    let pair = pair(&lab, settings);
    let pulse = Pulse::start(&lab)?;
    pulse.beat_on(STEADY);
    if !is_standby(&pair.backup) {
        return Ok(None);
    }
    pair.primary_dies(&lab, death);
    // Nobody asks the backup how it does until it has done: that would take time from it.
    pulse.beat_on(STEADY);
    pair.wait_takeover();
    let seen = pulse.finish().context("the connection did not survive")?;
    if seen.longest > FAR_OFF {
        let log = pair.backup.log();
        eprintln!(
            "a blackout of {:?}; what the standby said:\n{log}",
            seen.longest
        );
    }
    Ok(Some(seen.longest))
}
