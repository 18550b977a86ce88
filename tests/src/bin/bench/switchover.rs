//! How long a client waits when the VIP is handed over as planned.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::pulse::Pulse;
use tests::report::{Figure, row, spread, table};
use tests::{Bridge, Lab, LabOptions, Settings, Tap};

use crate::settled::{is_standby, pair, valid};

/// Heartbeats, and how many may be missed. Nobody waits for one: only whether the thread wakes up for
/// each, or at its own pace, makes a difference.
const HEARTBEATS: [(&str, u32); 2] = [("10ms", 3), ("1ms", 3)];
const TARGET: Duration = Duration::from_millis(2);
/// Echoes before and after.
const STEADY: u64 = 300;

/// Who is asked.
#[derive(Clone, Copy)]
enum Asked {
    Active,
    Standby,
    /// By SIGTERM.
    ActiveEnds,
}

const ASKED: [(&str, Asked); 3] = [
    ("the active", Asked::Active),
    ("the standby", Asked::Standby),
    ("SIGTERM of the active", Asked::ActiveEnds),
];

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    println!(
        "### Longest gap between echoes of a live connection at 1 kHz across a switchover, \
         `tap: mirror`, `protect: sync`, {runs} runs each\n\n\
         An echo comes each millisecond, so the gap is 1 ms longer than the time in which nobody \
         answers.\n"
    );
    let mut rows = vec![row([
        "heartbeats",
        "asked",
        "median",
        "least",
        "greatest",
        "target",
        "void runs",
    ])];
    let mut figures = Vec::new();
    for (interval, missed) in HEARTBEATS {
        let settings = Settings {
            tap: Tap::Mirror,
            sync: true,
            ..Settings::heartbeat(interval, missed)
        };
        for (name, asked) in ASKED {
            let (mut gaps, mut void) = (Vec::new(), 0);
            for _ in 0..runs {
                gaps.push(valid(&mut void, || blackout(&settings, asked))?);
            }
            let (median, least, greatest) = spread(&gaps);
            let heartbeats = format!("{interval} × {missed}");
            figures.push(Figure::at_most(
                format!("blackout of a switchover at {heartbeats}, {name}, median"),
                median,
                TARGET,
                fine,
            ));
            let target = format!("≤ {}", fine(TARGET));
            let [median, least, greatest] = [median, least, greatest].map(fine);
            let (name, void) = (name.to_owned(), void.to_string());
            rows.push(vec![
                heartbeats, name, median, least, greatest, target, void,
            ]);
        }
    }
    println!("{}", table(&rows));
    Ok(figures)
}

fn fine(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

/// The longest gap across a switchover; `None` if the nodes changed places before.
fn blackout(settings: &Settings, asked: Asked) -> Result<Option<Duration>> {
    let lab = Lab::build(&LabOptions {
        bridge: Bridge::Learning,
        ..LabOptions::default()
    })?;
    let mut pair = pair(&lab, settings);
    let pulse = Pulse::start(&lab)?;
    pulse.beat_on(STEADY);
    if !is_standby(&pair.backup) {
        return Ok(None);
    }
    pair.backup.wait_flows("lockstep", 1);
    let output = match asked {
        Asked::Active => Some(pair.primary.ask(&["switchover"])),
        Asked::Standby => Some(pair.backup.ask(&["switchover"])),
        Asked::ActiveEnds => {
            pair.primary.terminate();
            None
        }
    };
    if let Some(output) = output {
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "refused: {errors}");
    }
    pulse.beat_on(STEADY);
    let status = pair.backup.status().context("no status")?;
    ensure!(
        status["last_failover"]["reason"] == "switchover",
        "not a switchover: {status}"
    );
    let seen = pulse.finish().context("the connection did not survive")?;
    Ok(Some(seen.longest))
}
