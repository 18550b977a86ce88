//! What it costs to turn live shadows into kernel sockets, what others notice of it, and how fast a
//! connection is before and after.

use std::io::Read;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::port;
use tests::client::connect;
use tests::metrics::Metrics;
use tests::patience::wait_until;
use tests::pulse::Pulse;
use tests::report::{Figure, median, millis, range, row, spread, table};
use tests::{Agent, Bridge, Host, Lab, LabOptions, Settings, Wiring};

use crate::bulk::{Way, speed};
use crate::plain::Plain;
use crate::process::threads;
use crate::settled::{epoch, pair, valid};
use crate::site::{last_cpu, pin_host};
use crate::takeover::converse;

/// Idle flows at the death.
const FLOWS: usize = 10_000;
/// Above this a median says no more.
const RUNS_MOST: usize = 10;
/// The agent's thread that runs shadows and moves them.
const SHADOW_THREAD: &str = "rfsis-shadows";
/// Echoes before the death, and after the last adoption.
const STEADY: u64 = 300;

/// Where BBR is the default, a client that has waited for a takeover takes the path for a slow one: it then spaces
/// its numbers by 10 ms of its own accord. And bulk over this path, of some 40 µs there and back, would measure how
/// often anybody wakes on these CPUs: it takes each pause for a slower path (`docs/benchmarks.md`).
const UNPACED: (&str, &str) = ("ipv4/tcp_congestion_control", "reno");

/// Work on a flow, microseconds; all of them; and a gap for another flow.
const TARGET_WORK: f64 = 20.0;
const TARGET_ALL: Duration = Duration::from_secs(1);
const TARGET_GAP: Duration = Duration::from_millis(5);
/// An adopted flow, of the bare kernel's.
const TARGET_SPEED: f64 = 0.95;

/// One run with many idle flows.
struct Adoption {
    /// `kill -STOP` → the first and the last flow is the kernel's.
    first: Duration,
    last: Duration,
    /// Mean of a flow, microseconds: a socket made and handed over; CPU of the shadow thread in all.
    made: f64,
    cpu: f64,
    /// Memory of the agent for a flow, KiB: more at the end than before the first.
    memory: f64,
    /// Longest gap of the 1 kHz echo between the first and the last, and in as long a time afterwards.
    gap: Duration,
    gap_after: Duration,
}

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let runs = runs.min(RUNS_MOST);
    println!(
        "### Adoption of {FLOWS} idle flows and one at 1 kHz by the kernel, median (greatest) of {runs} \
         runs\n\n\
         A takeover at 10 ms × 3 from an active that hangs. A flow is asked for 0.2 s after it, so that nothing of the old active's is \
         on its way.\n"
    );
    let (mut outcomes, mut void) = (Vec::new(), 0);
    for _ in 0..runs {
        outcomes.push(valid(&mut void, adoption)?);
    }
    let time = |of: fn(&Adoption) -> Duration| spread(&outcomes.iter().map(of).collect::<Vec<_>>());
    let work = |of: fn(&Adoption) -> f64| outcomes.iter().map(of).collect::<Vec<_>>();
    let millis_of = |of| {
        let (median, _, greatest) = time(of);
        format!("{} ({})", millis(median), millis(greatest))
    };
    let rows = vec![
        row([
            "stop to first",
            "stop to last",
            "first to last",
            "socket made and handed over, each",
            "CPU of the shadow thread, each",
            "longest gap of the 1 kHz echo",
            "in as long a time afterwards",
            "void runs",
        ]),
        vec![
            millis_of(|o| o.first),
            millis_of(|o| o.last),
            millis_of(|o| o.last - o.first),
            range(&work(|o| o.made), " µs"),
            range(&work(|o| o.cpu), " µs"),
            millis_of(|o| o.gap),
            millis_of(|o| o.gap_after),
            void.to_string(),
        ],
    ];
    println!("{}", table(&rows));
    let micros = |work: f64| format!("{work:.1} µs");
    let mut figures = vec![
        Figure::at_most(
            "adoption: socket made and handed over, mean of a flow",
            median(&work(|o| o.made)),
            TARGET_WORK,
            micros,
        ),
        Figure::told(
            "adoption: CPU of the shadow thread for a flow, asked, heard and moved",
            micros(median(&work(|o| o.cpu))),
        ),
        Figure::told(
            "adoption: more memory of the agent for a flow, at the end",
            format!("{:.1} KiB", median(&work(|o| o.memory))),
        ),
        Figure::at_most(
            "adoption of 10,000 idle flows, first to last",
            time(|o| o.last - o.first).0,
            TARGET_ALL,
            millis,
        ),
        Figure::at_most(
            "adoption of 10,000 idle flows, longest gap of a 1 kHz echo",
            time(|o| o.gap).0,
            TARGET_GAP,
            millis,
        ),
        Figure::told(
            "the same echo in as long a time after that",
            millis(time(|o| o.gap_after).0),
        ),
    ];
    figures.extend(speeds(runs)?);
    Ok(figures)
}

/// One run; `None` if the nodes changed places before the death.
fn adoption() -> Result<Option<Adoption>> {
    let lab = Lab::build(&LabOptions {
        client_sysctls: vec![UNPACED],
        ..LabOptions::default()
    })?;
    let pair = pair(&lab, &Settings::heartbeat("10ms", 3));
    let begun = epoch(&pair.backup);
    let _clients = match converse(&lab, FLOWS) {
        Err(_) if epoch(&pair.backup) != begun => return Ok(None),
        clients => clients?,
    };
    let pulse = Pulse::start(&lab)?;
    pulse.beat_on(STEADY);
    let status = pair.backup.wait_status("all flows lockstep", |status| {
        status["state"] != "standby" || status["flows"]["lockstep"] == FLOWS + 1
    });
    if status["state"] != "standby" {
        return Ok(None);
    }
    let without = pair.backup.resident_kib()?;
    // Not killed: its kernel would then close its sockets on this machine's CPUs.
    let stopped = pair.primary.stop();
    let first = wait_adopted(&pair.backup, 1);
    let cpu_before = shadow_cpu(&pair.backup)?;
    let last = wait_adopted(&pair.backup, FLOWS + 1);
    let cpu = shadow_cpu(&pair.backup)? - cpu_before;
    let with = pair.backup.resident_kib()?;
    let metrics = pair.backup.metrics();
    ensure!(adopted(&metrics, "failed") == 0.0, "some were refused");
    let took = last - first;
    // As long again, for comparison: this machine has pauses of its own.
    while last.elapsed() < took + Duration::from_millis(50) {
        pulse.beat_on(1);
    }
    let echoes = pulse.end().context("the connection did not survive")?;
    let gap = |from, until| {
        let gap = echoes.longest_gap(Some(from), Some(until));
        gap.context("no echoes")
    };
    let sum = metrics.sum("rfsis_adoption_duration_seconds_sum", &[]);
    let flows = (FLOWS + 1) as f64;
    Ok(Some(Adoption {
        first: first - stopped,
        last: last - stopped,
        made: sum * 1e6 / flows,
        cpu: cpu.as_secs_f64() * 1e6 / flows,
        memory: with.saturating_sub(without) as f64 / flows,
        gap: gap(first, last)?,
        gap_after: gap(last, last + took)?,
    }))
}

fn adopted(metrics: &Metrics, result: &str) -> f64 {
    metrics.sum("rfsis_adoptions_total", &[("result", result)])
}

/// When so many flows were the kernel's, as far as somebody who looks now and then can tell.
fn wait_adopted(agent: &Agent, count: usize) -> Instant {
    agent.wait_metric(
        "rfsis_adoptions_total",
        &[("result", "adopted")],
        count as f64,
    );
    Instant::now()
}

fn shadow_cpu(agent: &Agent) -> Result<Duration> {
    let threads = threads(agent.pid())?;
    let found = threads.iter().find(|thread| thread.name == SHADOW_THREAD);
    Ok(found.context("the agent has no shadow thread")?.cpu)
}

/// Gbit/s of one connection, in one round.
struct Speeds {
    /// Of the plain server, without RFSIS.
    bare: f64,
    /// Accepted by the node that took over.
    accepted: f64,
    /// That it has adopted.
    adopted: f64,
    /// On a live shadow, which it stays on because its client has half-closed; downwards only.
    live: Option<f64>,
}

fn speeds(rounds: usize) -> Result<Vec<Figure>> {
    println!(
        "### Bulk TCP on one connection after a takeover, offloads on, endpoints pinned: median \
         (least–greatest) of {rounds} paired rounds, Gbit/s. Congestion control: reno\n"
    );
    let mut rows = vec![row([
        "way",
        "bare kernel",
        "accepted after the takeover",
        "adopted",
        "on a live shadow",
        "adopted, of bare",
        "adopted, of accepted",
    ])];
    let (mut figures, mut void) = (Vec::new(), 0);
    for way in Way::ALL {
        let mut outcomes = Vec::new();
        for round in 0..rounds {
            outcomes.push(valid(&mut void, || round_of(way, round % 2 == 1))?);
        }
        let column = |of: fn(&Speeds) -> f64| outcomes.iter().map(of).collect::<Vec<_>>();
        let live: Vec<f64> = outcomes.iter().filter_map(|o| o.live).collect();
        let (of_bare, of_accepted) = (
            column(|o| o.adopted / o.bare),
            column(|o| o.adopted / o.accepted),
        );
        let live = match &live[..] {
            [] => "–".to_owned(),
            live => range(live, ""),
        };
        rows.push(vec![
            way.name().to_owned(),
            range(&column(|o| o.bare), ""),
            range(&column(|o| o.accepted), ""),
            range(&column(|o| o.adopted), ""),
            live.clone(),
            range(&of_bare, ""),
            range(&of_accepted, ""),
        ]);
        let what = format!("one adopted connection {}", way.name());
        let ratio = |ratio: f64| format!("{ratio:.2}");
        figures.push(Figure::at_least(
            format!("{what}, of the bare kernel's"),
            median(&of_bare),
            TARGET_SPEED,
            ratio,
        ));
        figures.push(Figure::told(
            format!("{what}, of one accepted after the takeover"),
            ratio(median(&of_accepted)),
        ));
        if way == Way::Down {
            figures.push(Figure::told(
                "one connection down on a live shadow, Gbit/s",
                live,
            ));
        }
    }
    println!("{}\nVoid runs: {void}\n", table(&rows));
    Ok(figures)
}

fn lab() -> Result<Lab> {
    let lab = Lab::build(&LabOptions {
        bridge: Bridge::Learning,
        offloads: true,
        ..LabOptions::default()
    })?;
    let (key, value) = UNPACED;
    for host in Host::ALL {
        lab.host(host).sysctl(key, value)?;
    }
    Ok(lab)
}

/// Bare first, or last: a drift of the machine meets both alike.
fn round_of(way: Way, bare_last: bool) -> Result<Option<Speeds>> {
    let before = (!bare_last).then(|| bare(way)).transpose()?;
    let Some(mut speeds) = after_takeover(way)? else {
        return Ok(None);
    };
    speeds.bare = match before {
        Some(speed) => speed,
        None => bare(way)?,
    };
    Ok(Some(speeds))
}

fn service(way: Way) -> u16 {
    match way {
        Way::Up => port::DISCARD,
        Way::Down => port::CHARGEN,
    }
}

fn bare(way: Way) -> Result<f64> {
    let lab = lab()?;
    let plain = Plain::start(&lab, Host::A)?;
    pin_host(plain.pid(), last_cpu()?)?;
    speed(&connect(&lab, service(way))?, way)
}

/// `None` if the nodes changed places before the death.
fn after_takeover(way: Way) -> Result<Option<Speeds>> {
    let lab = lab()?;
    let pair = pair(&lab, &Wiring::MirrorOffloaded.settings());
    let old = connect(&lab, service(way))?;
    let half_closed = (way == Way::Down)
        .then(|| connect(&lab, port::CHARGEN))
        .transpose()?;
    if let Some(mut stream) = half_closed.as_ref() {
        stream.shutdown(Shutdown::Write)?;
        stream.read_exact(&mut [0; 1000])?;
    }
    let flows = 1 + u64::from(half_closed.is_some());
    let status = pair.backup.wait_status("the flows in lockstep", |status| {
        status["state"] != "standby" || status["flows"]["lockstep"] == flows
    });
    if status["state"] != "standby" {
        return Ok(None);
    }
    pair.primary.kill9();
    pair.wait_takeover();
    wait_until(
        "its adoption",
        || {
            // A download is acknowledged, and so adopted, only if somebody reads it.
            let read = match way {
                Way::Up => Ok(()),
                Way::Down => (&old).read_exact(&mut [0; 64 << 10]),
            };
            read.map(|()| adopted(&pair.backup.metrics(), "adopted"))
        },
        |count| !matches!(count, Ok(0.0)),
    )?;
    pin_host(pair.backup.pid(), last_cpu()?)?;
    let adopted = speed(&old, way)?;
    drop(old);
    let live = half_closed.map(|stream| speed(&stream, way)).transpose()?;
    let accepted = speed(&connect(&lab, service(way))?, way)?;
    Ok(Some(Speeds {
        bare: f64::NAN,
        accepted,
        adopted,
        live,
    }))
}
