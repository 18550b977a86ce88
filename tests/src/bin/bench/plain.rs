//! The same service without RFSIS: the agent's own handlers on the virtual IP, and nothing else. It is this
//! program again, in the node's namespace.

use std::io;
use std::process::{Child, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use rfsis_agent::config::{Protocol, Service};
use rfsis_agent::handler::HandlerKind;
use rfsis_agent::metrics::Metrics;
use rfsis_agent::services::{Connections, FlowGate, Services};
use rfsis_common::maps::{FlowKey, State};
use tests::agent::port;
use tests::client::connect;
use tests::netns::mortal;
use tests::patience::wait_until;
use tests::{Host, Lab, VIP};
use tokio_util::sync::CancellationToken;

/// The argument that makes this program such a server.
pub const ARGUMENT: &str = "serve-plainly";

/// A running server.
#[derive(Debug)]
pub struct Plain(Child);

impl Plain {
    /// Gives the virtual IP to a host and serves there.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(lab: &Lab, host: Host) -> Result<Self> {
        let namespace = lab.host(host);
        namespace.sh(&format!("ip addr add {VIP}/24 dev eth0"))?;
        let mut command = mortal(std::env::current_exe().context("where this program is")?);
        command.arg(ARGUMENT).stdin(Stdio::null());
        let server = Self(namespace.spawn(command)?);
        // It begins with one service after the other.
        for port in [port::ECHO, port::DISCARD, port::CHARGEN] {
            wait_until(
                "the plain server",
                || connect(lab, port).map(drop),
                Result::is_ok,
            )?;
        }
        Ok(server)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Nobody holds what leaves.
struct NoGate;

impl FlowGate for NoGate {
    fn approve(&self, _: FlowKey) -> io::Result<()> {
        Ok(())
    }

    fn revoke(&self, _: FlowKey) -> io::Result<()> {
        Ok(())
    }
}

/// Serves until killed.
///
/// # Errors
/// When a service cannot listen.
pub fn serve() -> Result<()> {
    // As the agent's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let services = [
            ("echo", port::ECHO, HandlerKind::Echo),
            ("discard", port::DISCARD, HandlerKind::Discard),
            ("chargen", port::CHARGEN, HandlerKind::Chargen),
        ];
        let services = services.map(|(name, port, handler)| Service {
            name: name.into(),
            protocol: Protocol::Tcp,
            port,
            handler,
        });
        let (connections, _snapshots) = Connections::new()?;
        // Kept: when nobody can tell the state any more, the connections end.
        let (_active, state) = tokio::sync::watch::channel(State::Active);
        Services::bind(VIP, &services)?
            .run(
                state,
                // Nobody adopts anything here.
                tokio::sync::mpsc::channel(1).1,
                Arc::new(NoGate),
                connections,
                Arc::new(Metrics::new("bench")?),
                CancellationToken::new(),
            )
            .await;
        Ok(())
    })
}
