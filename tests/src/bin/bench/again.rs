//! Again and again: many failovers under the same connections, how long the pair is without redundancy after
//! each, and bulk transfers with a switchover every second.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::port;
use tests::client::{chargen_exactly, connect, parts};
use tests::cluster::{Turn, seed};
use tests::pulse::{Echoes, Pulse};
use tests::report::{Figure, millis, row, spread, table};
use tests::{Cluster, Failover, Lab, LabOptions, Typist, Wiring};

use crate::takeover::converse;

/// Failovers in one run: as many as there is time for in a quiet hour's slice.
const FAILOVERS: usize = 20;
/// Idle flows that are handed over to the node that returns.
const FLOWS: [usize; 3] = [1, 1_000, 10_000];
/// Above this a median says no more.
const RUNS_MOST: usize = 5;
/// Full redundancy with 10,000 flows may take this long on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// A bulk transfer at the least, and what of it is asked for at a time.
const BULK: u64 = 1 << 30;
const PIECE: u64 = 64 << 10;
/// Switchovers beneath it at the least, and the time between two of them.
const SWITCHOVERS: usize = 4;
const PAUSE: Duration = Duration::from_secs(1);

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let mut figures = failovers(runs)?;
    figures.extend(returns(runs.min(RUNS_MOST))?);
    figures.extend(bulk()?);
    Ok(figures)
}

/// One failover of many.
struct Outcome {
    how: Failover,
    gap: Duration,
    /// From the old active's return.
    repaired: Duration,
}

fn lab(wiring: Wiring) -> Result<Lab> {
    Lab::build(&wiring.options(LabOptions::default()))
}

fn failovers(runs: usize) -> Result<Vec<Figure>> {
    let total = runs * FAILOVERS;
    let seed = seed();
    println!(
        "### {total} failovers under the same two connections, {FAILOVERS} to a lab, `tap: mirror`, `protect: sync`, \
         50 ms × 6: median (greatest)\n\nSeed {seed}. Each ends when all is protected again.\n"
    );
    let ways = Failover::shuffled(total, seed);
    let mut outcomes = Vec::new();
    for ways in ways.chunks(FAILOVERS) {
        outcomes.extend(survive(ways)?);
    }
    let mut rows = vec![row([
        "how",
        "failovers",
        "longest gap of the 1 kHz echo",
        "return to full redundancy",
    ])];
    for how in Failover::ALL {
        let of: Vec<&Outcome> = outcomes.iter().filter(|o| o.how == how).collect();
        let time = |of: Vec<Duration>| {
            let (median, _, greatest) = spread(&of);
            format!("{} ({})", millis(median), millis(greatest))
        };
        rows.push(vec![
            format!("{how:?}"),
            of.len().to_string(),
            time(of.iter().map(|o| o.gap).collect()),
            time(of.iter().map(|o| o.repaired).collect()),
        ]);
    }
    println!("{}", table(&rows));
    Ok(vec![Figure::told(
        "failovers under the same `nc` session and 1 kHz echo, byte-exact and without a reset",
        outcomes.len().to_string(),
    )])
}

fn survive(ways: &[Failover]) -> Result<Vec<Outcome>> {
    let lab = lab(Wiring::Mirror)?;
    let mut cluster = Cluster::start(&lab, &Wiring::Mirror.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("typed once");
    let pulse = Pulse::start(&lab)?;
    cluster.wait_redundant(2, PATIENCE);
    let mut turns = Vec::new();
    for &how in ways {
        pulse.beat_on(100);
        let turn = cluster.fail_over(how);
        nc.echoes("typed on");
        let redundant = cluster.wait_redundant(2, PATIENCE);
        turns.push((how, turn, redundant));
    }
    ensure!(nc.hang_up().success(), "nc failed");
    let echoes: Echoes = pulse.end().context("the echo did not survive")?;
    let outcome = |(how, turn, redundant): (Failover, Turn, Instant)| {
        // A cut that falls between two echoes begins with the one before.
        let from = turn.broken.checked_sub(Duration::from_millis(2));
        let gap = echoes.longest_gap(from, Some(redundant));
        Ok(Outcome {
            how,
            gap: gap.context("no echoes")?,
            repaired: redundant - turn.back,
        })
    };
    turns.into_iter().map(outcome).collect()
}

/// From the return of the old active to a standby that guards every flow.
fn returns(runs: usize) -> Result<Vec<Figure>> {
    println!(
        "### From the start of a killed active's agent to full redundancy, `tap: mirror`, `protect: sync`, median \
         (greatest) of {runs} runs\n\nIdle flows, and one at 1 kHz.\n"
    );
    let mut rows = vec![row([
        "flows",
        "to full redundancy",
        "longest gap of the 1 kHz echo",
    ])];
    let mut figures = Vec::new();
    for flows in FLOWS {
        let outcomes = (0..runs)
            .map(|_| return_of(flows))
            .collect::<Result<Vec<_>>>()?;
        let time = |of: fn(&(Duration, Duration)) -> Duration| {
            spread(&outcomes.iter().map(of).collect::<Vec<_>>())
        };
        let (repaired, gap) = (time(|o| o.0), time(|o| o.1));
        rows.push(vec![
            flows.to_string(),
            format!("{} ({})", millis(repaired.0), millis(repaired.2)),
            format!("{} ({})", millis(gap.0), millis(gap.2)),
        ]);
        figures.push(Figure::told(
            format!("return of the old active to full redundancy, {flows} flows"),
            millis(repaired.0),
        ));
    }
    println!("{}", table(&rows));
    Ok(figures)
}

/// Return to redundancy, and the longest gap of an echo meanwhile.
fn return_of(flows: usize) -> Result<(Duration, Duration)> {
    let lab = lab(Wiring::Mirror)?;
    let mut cluster = Cluster::start(&lab, &Wiring::Mirror.settings());
    let _clients = converse(&lab, flows)?;
    let pulse = Pulse::start(&lab)?;
    let all = flows as u64 + 1;
    cluster.wait_redundant(all, PATIENCE);
    cluster.kill_active();
    cluster.active().wait_state("active");
    let adopted = [("result", "adopted")];
    cluster
        .active()
        .wait_metric("rfsis_adoptions_total", &adopted, all as f64);
    pulse.beat_on(100);
    let back = cluster.start_standby();
    let redundant = cluster.wait_redundant(all, PATIENCE);
    let echoes = pulse.end().context("the echo did not survive")?;
    let gap = echoes.longest_gap(Some(back), Some(redundant));
    Ok((redundant - back, gap.context("no echoes")?))
}

fn bulk() -> Result<Vec<Figure>> {
    println!(
        "### 1 GiB or more on one connection with a switchover every second, {SWITCHOVERS} or more, offloads on, `tap: mirror`, `protect: sync`\n"
    );
    let mut rows = vec![row(["way", "GiB", "switchovers", "took", "Gbit/s"])];
    let mut figures = Vec::new();
    for (way, service) in [("up", port::DISCARD), ("down", port::CHARGEN)] {
        let (bytes, switchovers, took) = transfer(service)?;
        let rate = bytes as f64 * 8e-9 / took.as_secs_f64();
        let rate = format!("{rate:.2}");
        rows.push(vec![
            way.to_owned(),
            format!("{:.1}", bytes as f64 / (1_u64 << 30) as f64),
            switchovers.to_string(),
            format!("{took:.1?}"),
            rate.clone(),
        ]);
        figures.push(Figure::told(
            format!("bulk {way} with {switchovers} switchovers beneath it, Gbit/s"),
            rate,
        ));
    }
    println!("{}", table(&rows));
    Ok(figures)
}

/// Bytes, switchovers and time.
fn transfer(service: u16) -> Result<(u64, usize, Duration)> {
    let lab = lab(Wiring::MirrorOffloaded)?;
    let mut cluster = Cluster::start(&lab, &Wiring::MirrorOffloaded.settings());
    let stream = connect(&lab, service)?;
    let (bytes, enough) = (AtomicU64::new(0), AtomicBool::new(false));
    let goes_on = || !enough.load(Ordering::Relaxed) || bytes.load(Ordering::Relaxed) < BULK;
    let began = Instant::now();
    let (switchovers, took) = std::thread::scope(|scope| {
        let client = scope.spawn(|| -> Result<()> {
            let (mut output, chunk) = (&stream, vec![7; PIECE as usize]);
            while goes_on() {
                if service == port::DISCARD {
                    output.write_all(&chunk).context("uploading")?;
                    bytes.fetch_add(PIECE, Ordering::Relaxed);
                } else {
                    chargen_exactly(&stream, bytes.load(Ordering::Relaxed), PIECE, &bytes)?;
                }
            }
            if service == port::DISCARD {
                parts(&stream)?;
            }
            Ok(())
        });
        let mut switchovers = 0;
        let mut due = began + PAUSE;
        while !client.is_finished() {
            if Instant::now() < due {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            // Refused while the flow is at risk: it is tried again until it is not.
            if cluster.switch_over().is_ok() {
                switchovers += 1;
                enough.store(switchovers >= SWITCHOVERS, Ordering::Relaxed);
                due += PAUSE;
            }
        }
        let took = began.elapsed();
        client.join().ok().context("the client panicked")??;
        anyhow::Ok((switchovers, took))
    })?;
    Ok((bytes.into_inner(), switchovers, took))
}
