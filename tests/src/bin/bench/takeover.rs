//! What a takeover costs the standby with one flow and with many, and what it keeps of each.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::port;
use tests::patience::{PATIENCE, wait_until};
use tests::report::{Figure, median, millis, row, spread, table};
use tests::{Agent, Lab, Settings, VIP};

use crate::settled::{epoch, pair, valid};

/// Idle flows at the death.
const FEW: usize = 1;
const MANY: usize = 10_000;
/// Every so many'th connection must answer afterwards.
const SAMPLE: usize = 100;
/// Above this a median says no more.
const RUNS_MOST: usize = 10;

/// Longest takeover with one flow; with many it may take this many times as long.
const TARGET: Duration = Duration::from_millis(1);
const TARGET_RATIO: f64 = 3.0;
/// RSS of an idle flow.
const TARGET_KIB: f64 = 16.0;

/// One run.
struct Takeover {
    /// Deadline noticed → VIP announced.
    work: Duration,
    /// Deadline noticed → every shadow live.
    all_live: Duration,
    /// `kill -9` → first echo on the connection that spoke at the kill.
    first_echo: Duration,
    /// First echo → every connection of the sample has answered, one after the other.
    sample_answered: Duration,
    /// RSS of the standby without flows, and with them, before the death. KiB.
    resident: [f64; 2],
}

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let runs = runs.min(RUNS_MOST);
    println!(
        "### A takeover at 10 ms × 3 with idle echo flows, median (greatest) of {runs} runs\n\n\
         Work: from the deadline noticed to the VIP announced. Each connection has said one line and \
         heard it before the active's `kill -9`; {} of the many are tried afterwards.\n",
        MANY / SAMPLE
    );
    let mut rows = vec![row([
        "idle flows",
        "work",
        "all shadows live",
        "kill to first echo",
        "sample answered after",
        "RSS before",
        "RSS with flows",
    ])];
    // In turns, so that what else the machine does meets both alike.
    let (mut outcomes, mut void) = ([Vec::new(), Vec::new()], 0);
    for _ in 0..runs {
        for (outcomes, flows) in outcomes.iter_mut().zip([FEW, MANY]) {
            outcomes.push(valid(&mut void, || takeover(flows))?);
        }
    }
    for (outcomes, flows) in outcomes.iter().zip([FEW, MANY]) {
        let time = |of: fn(&Takeover) -> Duration| {
            let (median, _, greatest) = spread(&outcomes.iter().map(of).collect::<Vec<_>>());
            format!("{median:.1?} ({greatest:.1?})")
        };
        let mebibytes = |index: usize| {
            let resident: Vec<f64> = outcomes.iter().map(|o| o.resident[index]).collect();
            format!("{:.1} MiB", median(&resident) / 1024.0)
        };
        rows.push(vec![
            flows.to_string(),
            time(|o| o.work),
            time(|o| o.all_live),
            time(|o| o.first_echo),
            time(|o| o.sample_answered),
            mebibytes(0),
            mebibytes(1),
        ]);
    }
    println!("{}\nVoid runs: {void}\n", table(&rows));
    let [few, many] = &outcomes;
    let work =
        |outcomes: &[Takeover]| spread(&outcomes.iter().map(|o| o.work).collect::<Vec<_>>()).0;
    let ratio = work(many).as_secs_f64() / work(few).as_secs_f64();
    let each: Vec<f64> = many
        .iter()
        .map(|o| (o.resident[1] - o.resident[0]) / MANY as f64)
        .collect();
    let all_live: Vec<Duration> = many.iter().map(|o| o.all_live).collect();
    Ok(vec![
        Figure::at_most("takeover work, 1 flow, median", work(few), TARGET, |time| {
            format!("{:.3} ms", time.as_secs_f64() * 1e3)
        }),
        Figure::at_most(
            "takeover work, 10,000 idle flows against 1",
            ratio,
            TARGET_RATIO,
            |ratio| format!("{ratio:.2} ×"),
        ),
        Figure::told(
            "all of 10,000 shadows live after",
            millis(spread(&all_live).0),
        ),
        Figure::at_most(
            "memory of the agent per idle flow, at 10,000",
            median(&each),
            TARGET_KIB,
            |size| format!("{size:.1} KiB"),
        ),
    ])
}

/// One run; `None` if the nodes changed places before the death.
fn takeover(flows: usize) -> Result<Option<Takeover>> {
    let lab = Lab::build(&Default::default())?;
    let pair = pair(&lab, &Settings::heartbeat("10ms", 3));
    let begun = epoch(&pair.backup);
    let without = pair.backup.resident_kib()? as f64;
    let mut clients = match converse(&lab, flows) {
        Err(_) if epoch(&pair.backup) != begun => return Ok(None),
        clients => clients?,
    };
    let status = pair.backup.wait_status("all flows lockstep", |status| {
        status["state"] != "standby" || status["flows"]["lockstep"] == flows
    });
    if status["state"] != "standby" {
        return Ok(None);
    }
    let with = pair.backup.resident_kib()? as f64;

    let killed = pair.primary.kill9();
    // Nobody asks the backup how it does until it has done: that would take time from it.
    let speaker = clients.first_mut().context("no connection")?;
    say_and_hear(speaker, b"across\n").context("the connection that spoke at the kill")?;
    let first_echo = killed.elapsed();
    let answered = Instant::now();
    for client in clients.iter_mut().step_by(SAMPLE) {
        say_and_hear(client, b"after\n").context("a connection that was idle at the kill")?;
    }
    let sample_answered = answered.elapsed();
    let status = pair.backup.wait_state("active");
    let work = status["last_failover"]["duration_seconds"]
        .as_f64()
        .context("no last_failover in the status")?;
    Ok(Some(Takeover {
        work: Duration::from_secs_f64(work),
        all_live: all_live(&pair.backup)?,
        first_echo,
        sample_answered,
        resident: [without, with],
    }))
}

/// Connections to echo that have said a line and heard it.
pub fn converse(lab: &Lab, count: usize) -> Result<Vec<TcpStream>> {
    let mut clients = lab.client().run(|| -> Result<Vec<TcpStream>> {
        (0..count)
            .map(|number| {
                let connected = TcpStream::connect((VIP, port::ECHO));
                let client = connected.with_context(|| format!("connection {number}"))?;
                client.set_read_timeout(Some(PATIENCE))?;
                client.set_nodelay(true)?;
                Ok(client)
            })
            .collect()
    })?;
    for client in &mut clients {
        say_and_hear(client, b"before\n")?;
    }
    Ok(clients)
}

fn say_and_hear(client: &mut TcpStream, line: &[u8]) -> Result<()> {
    client.write_all(line)?;
    let mut heard = vec![0; line.len()];
    client.read_exact(&mut heard)?;
    ensure!(heard == line, "heard {heard:?}, expected {line:?}");
    Ok(())
}

/// What the agent's log says about its shadows: `shadows are live … live=10000 … duration=1.2ms`.
fn all_live(agent: &Agent) -> Result<Duration> {
    let log = wait_until(
        "\"shadows are live\" in the log",
        || agent.log(),
        |log| log.contains("shadows are live"),
    );
    let line = log
        .lines()
        .find(|line| line.contains("shadows are live"))
        .context("no line in the log")?;
    let (_, duration) = line
        .rsplit_once("duration=")
        .with_context(|| format!("no duration in {line:?}"))?;
    let word = duration.split_whitespace().next().unwrap_or_default();
    parse_duration(word).with_context(|| format!("{word:?} in {line:?} is no duration"))
}

/// What `Debug` of a [`Duration`] writes.
fn parse_duration(text: &str) -> Option<Duration> {
    let unit = text.find(|character: char| character.is_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let seconds = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

#[cfg(test)]
mod tests_of_durations {
    use super::*;

    #[test]
    fn a_duration_is_read_as_debug_writes_it() {
        for nanos in [7, 1_500, 2_250_000, 3_000_000_000] {
            let duration = Duration::from_nanos(nanos);
            assert_eq!(parse_duration(&format!("{duration:?}")), Some(duration));
        }
        assert_eq!(parse_duration("1.5h"), None);
    }
}
