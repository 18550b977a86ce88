//! One request after the other, each of 64 bytes: what a client waits longer with RFSIS.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::port;
use tests::client::connect;
use tests::report::{Figure, median, range, row, table};

use crate::meter::{COSTS, Reading, Usage, costs};
use crate::site::{Arm, Site, Turns, pin_client, ratios};

const ARMS: [Arm; 4] = [Arm::Bare, Arm::Async, Arm::Sync, Arm::SyncLink];
const REQUEST: [u8; 64] = [0x5a; 64];
/// Before and after, when what else happens is read.
const AROUND: Duration = Duration::from_millis(200);
const SPAN: Duration = Duration::from_millis(1500);
/// Above this a median says no more.
const ROUNDS_MOST: usize = 9;
/// Of bare.
const TARGET_MEDIAN: f64 = 1.15;
const TARGET_TAIL: f64 = 1.5;

/// How long the answers of one round took.
struct Waits {
    /// µs
    p50: f64,
    /// µs
    p99: f64,
    per_second: f64,
    usage: Usage,
}

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let rounds = runs.min(ROUNDS_MOST);
    println!(
        "### 64-byte requests to `echo`, one after the other on one connection, endpoints pinned: median \
         (least–greatest) of {rounds} paired rounds\n"
    );
    let mut turns = Turns::new(&ARMS);
    let outcomes = turns.measure(rounds, ask)?;
    let mut rows = vec![row([
        "protection",
        "p50",
        "of bare",
        "p99",
        "of bare",
        "requests/s",
    ])];
    let mut spent = vec![[&row(["protection"])[..], &row(COSTS)].concat()];
    let mut figures = Vec::new();
    for arm in ARMS {
        let column = |of: fn(&Waits) -> f64| outcomes[&arm].iter().map(of).collect::<Vec<_>>();
        let of_bare = |of: fn(&Waits) -> f64| ratios(&outcomes, arm, Arm::Bare, of);
        let (p50, p99) = (of_bare(|w| w.p50), of_bare(|w| w.p99));
        rows.push(vec![
            arm.name().to_owned(),
            format!("{:.1} µs", median(&column(|w| w.p50))),
            range(&p50, ""),
            format!("{:.1} µs", median(&column(|w| w.p99))),
            range(&p99, ""),
            format!("{:.0}", median(&column(|w| w.per_second))),
        ]);
        let usages: Vec<&Usage> = outcomes[&arm].iter().map(|o| &o.usage).collect();
        spent.push([&[arm.name().to_owned()][..], &costs(&usages)].concat());
        if matches!(arm, Arm::Sync | Arm::SyncLink) {
            let what = format!("64-byte requests, {}", arm.name());
            for (name, ratios, target) in [("p50", p50, TARGET_MEDIAN), ("p99", p99, TARGET_TAIL)] {
                figures.push(Figure::at_most(
                    format!("{what}: {name} of bare"),
                    median(&ratios),
                    target,
                    |ratio| format!("{ratio:.2}"),
                ));
            }
        }
    }
    println!(
        "{}\n{}\nVoid runs: {}\n",
        table(&rows),
        table(&spent),
        turns.void
    );
    Ok(figures)
}

fn ask(site: &Site) -> Result<Waits> {
    let client = connect(&site.lab, port::ECHO)?;
    let (mut waits, usage) = std::thread::scope(|scope| -> Result<_> {
        let asking = scope.spawn(|| converse(client));
        std::thread::sleep(AROUND / 2);
        let before = Reading::take(site)?;
        std::thread::sleep(AROUND / 2 + SPAN);
        let usage = Reading::take(site)?.since(&before);
        Ok((asking.join().ok().context("the client panicked")??, usage))
    })?;
    ensure!(!waits.is_empty(), "no answer in {SPAN:?}");
    waits.sort_unstable();
    let at = |share: f64| waits[(waits.len() as f64 * share) as usize].as_secs_f64() * 1e6;
    Ok(Waits {
        p50: at(0.50),
        p99: at(0.99),
        per_second: waits.len() as f64 / SPAN.as_secs_f64(),
        usage,
    })
}

fn converse(mut client: TcpStream) -> Result<Vec<Duration>> {
    pin_client()?;
    let (began, mut waits, mut answer) = (Instant::now(), Vec::new(), [0; REQUEST.len()]);
    loop {
        let asked = Instant::now();
        if asked - began >= AROUND + SPAN + AROUND {
            return Ok(waits);
        }
        client.write_all(&REQUEST).context("asking")?;
        client.read_exact(&mut answer).context("no answer")?;
        if (AROUND..AROUND + SPAN).contains(&(asked - began)) {
            waits.push(asked.elapsed());
        }
    }
}
