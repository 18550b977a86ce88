//! How long a client waits when the VIP is handed over as planned.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::pulse::Pulse;
use tests::report::{Figure, row, spread, table};
use tests::{Bridge, Capture, Host, Lab, LabOptions, Settings, Tap, Trace};

use crate::settled::{is_standby, pair, valid};

/// Heartbeats, and how many may be missed. Nobody waits for one: only whether the thread wakes up for
/// each, or at its own pace, makes a difference.
const HEARTBEATS: [(&str, u32); 2] = [("10ms", 3), ("1ms", 20)];
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
        "### A switchover under a live connection at 1 kHz, `tap: mirror`, `protect: sync`, {runs} runs \
         each\n\n\
         From the old active's last answer to the first of the new one, as the client's host gets them: \
         there is one each millisecond. The longest gap is that between any two answers of the whole run, \
         what else the machine does included.\n"
    );
    let mut rows = vec![row([
        "heartbeats",
        "asked",
        "median",
        "least",
        "greatest",
        "longest gap, median",
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
            let (mut blackouts, mut longest, mut void) = (Vec::new(), Vec::new(), 0);
            for _ in 0..runs {
                let seen = valid(&mut void, || blackout(&settings, asked))?;
                blackouts.push(seen.handover);
                longest.push(seen.longest);
            }
            let (median, least, greatest) = spread(&blackouts);
            let heartbeats = format!("{interval} × {missed}");
            figures.push(Figure::at_most(
                format!("blackout of a switchover at {heartbeats}, {name}, median"),
                median,
                TARGET,
                fine,
            ));
            let target = format!("≤ {}", fine(TARGET));
            let [median, least, greatest, longest] =
                [median, least, greatest, spread(&longest).0].map(fine);
            let (name, void) = (name.to_owned(), void.to_string());
            rows.push(vec![
                heartbeats, name, median, least, greatest, longest, target, void,
            ]);
        }
    }
    println!("{}", table(&rows));
    Ok(figures)
}

fn fine(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

/// What the client saw of one.
struct Seen {
    handover: Duration,
    longest: Duration,
}

/// One switchover; `None` if the nodes changed places before.
fn blackout(settings: &Settings, asked: Asked) -> Result<Option<Seen>> {
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
    let status = pair.backup.wait_status("the flow lockstep", |status| {
        status["state"] != "standby" || status["flows"]["lockstep"] == 1
    });
    if status["state"] != "standby" {
        return Ok(None);
    }
    let capture = Capture::start(&lab);
    if !is_standby(&pair.backup) {
        return Ok(None);
    }
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
    let (old, new) = (pair.primary.host(), pair.backup.host());
    let handover = between_owners(&capture.stop(), old, new)?;
    let status = pair.backup.status().context("no status")?;
    ensure!(
        status["last_failover"]["reason"] == "switchover",
        "not a switchover: {status}"
    );
    let seen = pulse.finish().context("the connection did not survive")?;
    Ok(Some(Seen {
        handover,
        longest: seen.longest,
    }))
}

/// From the last segment with data by the old owner of the VIP to the first by the new one.
fn between_owners(trace: &Trace, old: Host, new: Host) -> Result<Duration> {
    let answers = |host: Host| {
        trace
            .from_vip_by(host.mac())
            .filter(|frame| frame.tcp().is_some_and(|tcp| !tcp.payload.is_empty()))
    };
    let last = answers(old).last().context("the old active never spoke")?;
    let first = answers(new).next().context("the new active never spoke")?;
    Ok(first.at.duration_since(last.at)?)
}
