//! Bulk uploads through the VIP: what the standby's shadows keep up with, and what it costs the
//! client that they listen.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::SockRef;
use tests::agent::port;
use tests::client::connect;
use tests::metrics::Metrics;
use tests::patience::wait_until;
use tests::report::{Figure, median, range, row, table};
use tests::{Agent, Host, Lab, Settings};

use crate::process::{cpu_time, sleeps};
use crate::settled::{is_standby, pair, valid};

/// How long a client sends.
const SENDING: Duration = Duration::from_secs(3);
/// Above this a median says no more.
const ROUNDS_MOST: usize = 5;
/// SO_SNDBUF of the client, bytes: more than the service's window, and little against what is sent,
/// so that what was written is what was transferred.
const SEND_BUFFER: usize = 256 << 10;
/// The agent's thread that takes frames from the ring.
const SHADOW_THREAD: &str = "rfsis-shadows";
const CONNECTIONS: [usize; 2] = [1, 8];
/// How often an agent counts its flows for `status`; nothing tells that it has.
const COUNT_INTERVAL: Duration = Duration::from_millis(50);

/// What an upload did.
struct Upload {
    /// Of the client, all connections together.
    gigabits: f64,
    /// What the standby saw; `None` if there was none.
    seen: Option<Seen>,
}

/// What the standby saw of an upload.
struct Seen {
    /// Frames mirrored per second, both directions.
    rate: f64,
    mirrored: f64,
    /// Copies that the ring had no room for.
    lost: f64,
    /// Frames that the cable to the standby lost.
    lost_on_cable: u64,
    /// Frames by what the shadows made of them.
    results: Vec<(String, f64)>,
    lagging: u64,
    /// CPU of the standby's agent, of one core.
    cpu: f64,
    /// Of the standby's shadow thread, per second.
    wakeups: f64,
}

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let rounds = runs.min(ROUNDS_MOST);
    println!(
        "### Uploads to `discard` through the VIP, {} s each, median (least–greatest) of {rounds}\n",
        SENDING.as_secs()
    );
    let mut speed = vec![row([
        "connections",
        "no standby agent",
        "standby mirrors",
        "ratio",
    ])];
    let mut shadows = vec![row([
        "connections",
        "frames/s mirrored",
        "mirrored",
        "copies lost: ring",
        "cable",
        "shadows made of them",
        "flows lagging",
        "CPU of the standby's agent",
        "wake-ups/s of its shadow thread",
    ])];
    let (mut figures, mut void) = (Vec::new(), 0);
    for connections in CONNECTIONS {
        let (mut bare, mut with, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            // First one way round, then the other: a drift of the machine meets both alike.
            for standby in [round % 2 == 1, round % 2 == 0] {
                let upload = valid(&mut void, || upload(connections, standby))?;
                match upload.seen {
                    Some(what) => {
                        with.push(upload.gigabits);
                        seen.push(what);
                    }
                    None => bare.push(upload.gigabits),
                }
            }
        }
        let ratios: Vec<f64> = with
            .iter()
            .zip(&bare)
            .map(|(with, bare)| with / bare)
            .collect();
        speed.push(vec![
            connections.to_string(),
            range(&bare, " Gbit/s"),
            range(&with, " Gbit/s"),
            range(&ratios, ""),
        ]);
        let column = |of: fn(&Seen) -> f64| seen.iter().map(of).collect::<Vec<f64>>();
        let total = |of: fn(&Seen) -> f64| seen.iter().map(of).sum::<f64>();
        let (rate, mirrored, lost) = (
            median(&column(|s| s.rate)),
            total(|s| s.mirrored),
            total(|s| s.lost),
        );
        let lagging = format!(
            "{} of {}",
            seen.iter().map(|s| s.lagging).sum::<u64>(),
            connections * seen.len()
        );
        shadows.push(vec![
            connections.to_string(),
            format!("{rate:.0}"),
            format!("{mirrored}"),
            format!("{lost}"),
            seen.iter()
                .map(|s| s.lost_on_cable)
                .sum::<u64>()
                .to_string(),
            results(&seen),
            lagging.clone(),
            format!("{:.0} %", median(&column(|s| s.cpu)) * 100.0),
            format!("{:.0}", median(&column(|s| s.wakeups))),
        ]);
        let what = format!("upload, {connections} connections: ");
        figures.extend([
            Figure::told(
                format!("{what}client with a standby, of without"),
                format!("{:.2}", median(&ratios)),
            ),
            Figure::told(
                format!("{what}mirrored; copies lost; flows lagging"),
                format!(
                    "{rate:.0} frames/s; {:.3} %; {lagging}",
                    100.0 * lost / (mirrored + lost).max(1.0)
                ),
            ),
        ]);
    }
    println!(
        "{}\n{}\nVoid runs: {void}\n",
        table(&speed),
        table(&shadows)
    );
    Ok(figures)
}

/// One upload; `None` if the nodes changed places.
fn upload(connections: usize, with_standby: bool) -> Result<Option<Upload>> {
    let lab = Lab::build(&Default::default())?;
    let settings = Settings::default();
    if with_standby {
        let pair = pair(&lab, &settings);
        let upload = observed(&lab, &pair.backup, connections);
        return match is_standby(&pair.backup) {
            true => upload.map(Some),
            false => Ok(None),
        };
    }
    let alone = Agent::start(&lab, Host::A, "primary", &settings);
    alone.wait_state("active");
    let (_clients, gigabits) = send(&lab, connections)?;
    Ok(Some(Upload {
        gigabits,
        seen: None,
    }))
}

fn observed(lab: &Lab, standby: &Agent, connections: usize) -> Result<Upload> {
    let (before, cpu_before) = (standby.metrics(), cpu_time(standby)?);
    let lost_on_cable = lab.lost_towards(standby.host());
    let sleeps_before = sleeps(standby, SHADOW_THREAD)?;
    let began = Instant::now();
    // The connections stay open until the shadows have been counted.
    let (_clients, gigabits) = send(lab, connections)?;
    let elapsed = began.elapsed().as_secs_f64();
    let cpu = (cpu_time(standby)? - cpu_before).as_secs_f64() / elapsed;
    let wakeups = (sleeps(standby, SHADOW_THREAD)? - sleeps_before) as f64 / elapsed;
    // All that was mirrored has been taken from the ring.
    let after = wait_until(
        "the frame ring to be empty",
        || standby.metrics(),
        |scrape| scrape.sum("rfsis_frames_total", &[]) >= verdict(scrape, "mirrored"),
    );
    let mirrored = verdict(&after, "mirrored") - verdict(&before, "mirrored");
    std::thread::sleep(COUNT_INTERVAL * 2);
    let status = standby.status().context("no status of the standby")?;
    let results = after
        .changed_since(&before)
        .into_iter()
        .filter(|(series, ..)| series.starts_with("rfsis_frames_total{"))
        .map(|(series, before, after)| {
            let name = series.split('"').nth(1).unwrap_or_default();
            (name.to_owned(), after - before)
        })
        .collect();
    Ok(Upload {
        gigabits,
        seen: Some(Seen {
            rate: mirrored / elapsed,
            mirrored,
            lost: verdict(&after, "mirror_lost") - verdict(&before, "mirror_lost"),
            lost_on_cable: lab.lost_towards(standby.host()) - lost_on_cable,
            results,
            lagging: status["flows"]["lagging"].as_u64().unwrap_or(0),
            cpu,
            wakeups,
        }),
    })
}

fn verdict(metrics: &Metrics, verdict: &str) -> f64 {
    metrics.sum("rfsis_xdp_packets_total", &[("verdict", verdict)])
}

/// Sends on so many connections at once. Returns them, and Gbit/s of all together.
fn send(lab: &Lab, connections: usize) -> Result<(Vec<TcpStream>, f64)> {
    let clients = (0..connections)
        .map(|_| {
            let client = connect(lab, port::DISCARD)?;
            SockRef::from(&client).set_send_buffer_size(SEND_BUFFER)?;
            Ok(client)
        })
        .collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    let bytes = std::thread::scope(|scope| {
        let senders: Vec<_> = clients
            .iter()
            .map(|client| scope.spawn(move || send_until(client, began + SENDING)))
            .collect();
        senders.into_iter().try_fold(0, |bytes, sender| {
            let sent = sender.join().ok().context("a sender panicked")??;
            Ok::<u64, anyhow::Error>(bytes + sent)
        })
    })?;
    let gigabits = bytes as f64 * 8.0 / 1e9 / began.elapsed().as_secs_f64();
    Ok((clients, gigabits))
}

fn send_until(mut client: &TcpStream, end: Instant) -> Result<u64> {
    let chunk = vec![0x5a; 64 << 10];
    let mut bytes = 0;
    while Instant::now() < end {
        client.write_all(&chunk).context("sending")?;
        bytes += chunk.len() as u64;
    }
    Ok(bytes)
}

/// `ok 1234, from_active 567`, of all uploads together.
fn results(seen: &[Seen]) -> String {
    let mut sums = std::collections::BTreeMap::new();
    for (name, count) in seen.iter().flat_map(|seen| &seen.results) {
        *sums.entry(name).or_insert(0.0) += count;
    }
    let words: Vec<String> = sums
        .into_iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    words.join(", ")
}
