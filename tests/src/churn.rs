//! Short connections, so many a second whatever becomes of them: each says something, hears it, and ends.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::agent::port;
use crate::client::Noise;
use crate::lab::{Lab, VIP};
use crate::patience::{PATIENCE, slowed};

/// Bytes that each connection says.
const SAID: usize = 256;

/// Connections from the client to the echo service.
#[derive(Debug)]
pub struct Churn(JoinHandle<io::Result<Outcomes>>);

/// What became of them.
#[derive(Debug, Default)]
pub struct Outcomes {
    /// All bytes came back, and both sides have closed.
    pub exact: usize,
    /// Failed with an error of the system, by its name: a reset, a refusal.
    pub failed: BTreeMap<String, usize>,
    /// When those that failed had begun.
    pub failed_since: Vec<Instant>,
    /// Had wrong bytes, or no end within [`PATIENCE`].
    pub wrong: Vec<String>,
    /// The longest of those that are exact.
    pub longest: Duration,
}

impl Churn {
    /// `per_second` for this long.
    pub fn start(lab: &Lab, per_second: u32, duration: Duration) -> Self {
        let client = Arc::clone(lab.client());
        Self(std::thread::spawn(move || {
            client.run(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?
                    .block_on(churn(per_second, duration))
            })
        }))
    }

    /// Waits until all have ended.
    ///
    /// # Errors
    /// When the clients could not be run.
    pub fn finish(self) -> Result<Outcomes> {
        Ok(self.0.join().ok().context("the clients panicked")??)
    }
}

async fn churn(per_second: u32, duration: Duration) -> io::Result<Outcomes> {
    let (began, pause) = (Instant::now(), Duration::from_secs(1) / per_second);
    let total = (duration.as_secs_f64() * f64::from(per_second)) as u32;
    let mut outcomes = Outcomes::default();
    let mut clients = JoinSet::new();
    for number in 0..total {
        tokio::time::sleep_until((began + pause * number).into()).await;
        clients.spawn(async move {
            let began = Instant::now();
            let limit = slowed(PATIENCE);
            let ended = tokio::time::timeout(limit, exchange(number.into())).await;
            (began, ended)
        });
        while let Some(ended) = clients.try_join_next() {
            outcomes.note(ended?);
        }
    }
    while let Some(ended) = clients.join_next().await {
        outcomes.note(ended?);
    }
    Ok(outcomes)
}

type Ended = (Instant, Result<io::Result<()>, tokio::time::error::Elapsed>);

impl Outcomes {
    fn note(&mut self, (began, ended): Ended) {
        match ended {
            Ok(Ok(())) => {
                self.exact += 1;
                self.longest = self.longest.max(began.elapsed());
            }
            Ok(Err(error)) if error.raw_os_error().is_some() => {
                *self.failed.entry(error.kind().to_string()).or_default() += 1;
                self.failed_since.push(began);
            }
            Ok(Err(error)) => self.wrong.push(error.to_string()),
            Err(_) => self.wrong.push("no end".into()),
        }
    }
}

async fn exchange(number: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect((VIP, port::ECHO)).await?;
    let (mut said, mut heard) = ([0; SAID], Vec::with_capacity(SAID));
    Noise::new(number).fill(&mut said);
    stream.write_all(&said).await?;
    stream.shutdown().await?;
    stream.read_to_end(&mut heard).await?;
    if heard == said {
        Ok(())
    } else {
        let what = format!("connection {number}: {} of {SAID} bytes", heard.len());
        Err(io::Error::other(what))
    }
}
