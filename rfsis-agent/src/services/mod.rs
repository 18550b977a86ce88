//! The active's kernel sockets: listens on the VIP and runs the built-in handlers.
//!
//! Both nodes listen all the time; the XDP program and the gate decide whose kernel the client talks
//! to. What must hold here:
//!
//! - no FIN or RST of a connection leaves before the flow is approved ([`FlowGate`]), so that a crash
//!   says nothing to the client;
//! - a connection belongs to the epoch in which it was accepted, or adopted from a shadow: once the node is not active any more
//!   the peer carries it on, and the socket here is aborted in silence, behind the closed gate.

mod connections;
mod datagram;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{SetSockOpt as _, sockopt};
use rfsis_common::maps::{FlowKey, State};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::adopt::Adopted;
use crate::cli::Fatal;
use crate::config::{Protocol, Service};
use crate::handler::HandlerKind;
use crate::metrics::Metrics;
pub use connections::{Connections, Snapshots, Taken};
pub(crate) use datagram::LoopSources;
use stream::Start;

/// `SO_SNDBUF` of a connection, bytes: a shadow must be able to hold what a kernel socket holds. The
/// kernel doubles the number for its own bookkeeping, socket(7).
const SEND_BUFFER: usize = 128 * 1024;
/// `SO_RCVBUF` likewise. It bounds what a client may have under way, and with an ACK gate that lasts until
/// the standby has confirmed it. A shadow stores [`crate::shadow::REORDER_LIMIT`] of input.
pub(crate) const RECEIVE_BUFFER: usize = 512 * 1024;
/// Handshakes done and not yet accepted; `net.core.somaxconn` bounds it too.
const BACKLOG: i32 = 4096;
/// Pause after an accept or receive error that will not go away by itself, such as EMFILE.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Lets the FIN or RST of a flow through the gate.
pub trait FlowGate: Send + Sync {
    /// From now on FIN and RST of this flow may leave. Called before the socket is closed.
    ///
    /// # Errors
    /// The system's, when the flow cannot be noted; its FIN is then held.
    fn approve(&self, flow: FlowKey) -> io::Result<()>;

    /// A new connection has these numbers: what was approved for an older one is void.
    ///
    /// # Errors
    /// The system's, when the old approval cannot be removed.
    fn revoke(&self, flow: FlowKey) -> io::Result<()>;
}

/// A service cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("service {name}: cannot listen on {protocol}/{address}: {error}; {remedy}", protocol = protocol.as_str())]
pub struct ServiceError {
    /// The service.
    pub name: String,
    /// Its transport.
    pub protocol: Protocol,
    /// VIP and port.
    pub address: SocketAddrV4,
    /// What the system said.
    pub error: io::Error,
    /// What the operator can do.
    pub remedy: String,
}

impl From<ServiceError> for Fatal {
    fn from(error: ServiceError) -> Self {
        if error.error.kind() == io::ErrorKind::PermissionDenied {
            Fatal::Missing {
                what: format!(
                    "service {}: no permission to listen on {}/{}",
                    error.name,
                    error.protocol.as_str(),
                    error.address
                ),
                remedy: error.remedy,
            }
        } else {
            Fatal::Failed(error.into())
        }
    }
}

/// Sockets of all services, bound and not yet served.
#[derive(Debug)]
pub struct Services {
    vip: Ipv4Addr,
    streams: Vec<(Bound, TcpListener)>,
    datagrams: Vec<(Bound, UdpSocket)>,
}

/// Who answers on a socket.
#[derive(Debug)]
struct Bound {
    name: String,
    handler: HandlerKind,
}

impl Services {
    /// Binds a socket for each service on the VIP, which must be configured on an interface. Call
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// [`ServiceError`] for the first service that cannot listen.
    pub fn bind(vip: Ipv4Addr, services: &[Service]) -> Result<Services, ServiceError> {
        let mut bound = Services {
            vip,
            streams: Vec::new(),
            datagrams: Vec::new(),
        };
        for service in services {
            let address = SocketAddrV4::new(vip, service.port);
            let who = Bound {
                name: service.name.clone(),
                handler: service.handler,
            };
            let result = match service.protocol {
                Protocol::Tcp => {
                    listen(address).map(|listener| bound.streams.push((who, listener)))
                }
                Protocol::Udp => {
                    open_udp(address).map(|socket| bound.datagrams.push((who, socket)))
                }
            };
            result.map_err(|error| ServiceError {
                name: service.name.clone(),
                protocol: service.protocol,
                address,
                remedy: remedy(service.protocol, address, &error),
                error,
            })?;
        }
        Ok(bound)
    }

    /// Local addresses, TCP first, each in the order of the config.
    ///
    /// # Errors
    /// As of getsockname(2).
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let streams = self.streams.iter().map(|(_, socket)| socket.local_addr());
        let datagrams = self.datagrams.iter().map(|(_, socket)| socket.local_addr());
        streams.chain(datagrams).collect()
    }

    /// Serves until cancelled, and returns when the last socket is closed.
    ///
    /// `state` must say `Active` before the XDP program lets clients through, and must be sent only
    /// when the state changes: *every* send ends the epoch of the connections that are open, so that
    /// a quick way out of `Active` and back is not overlooked. They are aborted without approval.
    ///
    /// What comes by `adopted` is served as if it had been accepted.
    pub async fn run(
        self,
        state: watch::Receiver<State>,
        mut adopted: mpsc::Receiver<Vec<Adopted>>,
        gate: Arc<dyn FlowGate>,
        connections: Arc<Connections>,
        metrics: Arc<Metrics>,
        cancel: CancellationToken,
    ) {
        let tasks = TaskTracker::new();
        let udp_ports: Vec<u16> = self
            .datagrams
            .iter()
            .filter_map(|(_, socket)| Some(socket.local_addr().ok()?.port()))
            .collect();
        for (bound, socket) in self.datagrams {
            let answerer = datagram::Answerer {
                handler: bound.handler,
                loops: LoopSources::new(self.vip, udp_ports.clone()),
                counters: metrics.datagrams(&bound.name),
                state: state.clone(),
            };
            let cancel = cancel.clone();
            tasks.spawn(async move { cancel.run_until_cancelled(answerer.run(socket)).await });
        }
        let host = Host {
            gate,
            connections,
            tasks: tasks.clone(),
            cancel: cancel.clone(),
        };
        for (bound, listener) in self.streams {
            let acceptor = Acceptor {
                accepted: metrics.connections(&bound.name),
                errors: metrics.accept_errors(&bound.name),
                bound,
                state: state.clone(),
                host: host.clone(),
            };
            let cancel = cancel.clone();
            tasks.spawn(async move { cancel.run_until_cancelled(acceptor.run(listener)).await });
        }
        tasks.spawn(async move {
            let adopt = async {
                while let Some(batch) = adopted.recv().await {
                    for connection in batch {
                        host.adopt(connection);
                    }
                    // Behind them: who is served already does not wait for more than these.
                    tokio::task::yield_now().await;
                }
            };
            cancel.run_until_cancelled(adopt).await;
        });
        tasks.close();
        tasks.wait().await;
    }
}

/// Accepts the connections of one service.
struct Acceptor {
    bound: Bound,
    accepted: prometheus::IntCounter,
    errors: prometheus::IntCounter,
    state: watch::Receiver<State>,
    host: Host,
}

impl Acceptor {
    async fn run(mut self, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, SocketAddr::V4(client))) => {
                    self.accepted.inc();
                    self.start(stream, client);
                }
                // The listener is IPv4, so this is never reached; dropping is right if it were.
                Ok((_, SocketAddr::V6(_))) => {}
                Err(error) => {
                    self.errors.inc();
                    tracing::warn!(service = self.bound.name, %error, "cannot accept a connection");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            }
        }
    }

    fn start(&mut self, stream: TcpStream, client: SocketAddrV4) {
        // Marks the value as seen: from here on any change ends this connection's epoch.
        let active = *self.state.borrow_and_update() == State::Active;
        let service_port = match stream.local_addr() {
            Ok(address) if active => address.port(),
            _ => return stream::abort(&stream),
        };
        let flow = FlowKey {
            client_addr: u32::from(*client.ip()),
            client_port: client.port(),
            service_port,
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(?flow, %error, "TCP_NODELAY is not set");
        }
        let state = self.state.clone();
        let start = Start::of(self.bound.handler.stream());
        self.host.serve(stream, flow, start, state);
    }
}

/// What every connection's task needs.
#[derive(Clone)]
struct Host {
    gate: Arc<dyn FlowGate>,
    connections: Arc<Connections>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl Host {
    /// Goes on with a connection that was a shadow's.
    fn adopt(&self, adopted: Adopted) {
        let (flow, unfinished) = (adopted.flow, adopted.unfinished);
        let stream = match TcpStream::from_std(adopted.socket) {
            Ok(stream) => stream,
            Err(error) => {
                // Dropped without approval: the gate holds its FIN.
                tracing::warn!(?flow, %error, "an adopted connection cannot be served");
                return;
            }
        };
        let start = Start {
            handler: unfinished.handler,
            input: unfinished.input,
            promised: unfinished.promised,
            entry: Some(adopted.entry),
        };
        self.serve(stream, flow, start, adopted.epoch);
    }

    /// Serves a connection until any change from what was seen of `state`.
    fn serve(&self, stream: TcpStream, flow: FlowKey, start: Start, state: watch::Receiver<State>) {
        if let Err(error) = self.gate.revoke(flow) {
            tracing::warn!(?flow, %error, "an old approval of these numbers stays");
        }
        let connection = stream::Connection {
            stream,
            flow,
            gate: Arc::clone(&self.gate),
            connections: Arc::clone(&self.connections),
        };
        let epoch = Epoch {
            state,
            cancel: self.cancel.clone(),
        };
        self.tasks.spawn(connection.serve(start, epoch));
    }
}

/// The time in which a connection belongs to this node.
struct Epoch {
    state: watch::Receiver<State>,
    cancel: CancellationToken,
}

impl Epoch {
    /// The state has changed since the connection was accepted, or the agent stops.
    async fn ended(mut self) {
        // An error means that nobody tells the state any more: the agent is on its way out.
        let _ = self.cancel.run_until_cancelled(self.state.changed()).await;
    }
}

fn listen(address: SocketAddrV4) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // Before listen: accepted sockets inherit them, and the window scale is chosen from them.
    bound_buffers(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}

/// Gives a connection's socket, or a listener, its buffers.
pub(crate) fn bound_buffers(socket: &Socket) -> io::Result<()> {
    // Beyond `net.core.rmem_max` where that is allowed; the agent may.
    if sockopt::RcvBufForce.set(socket, &RECEIVE_BUFFER).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    socket.set_send_buffer_size(SEND_BUFFER)
}

fn open_udp(address: SocketAddrV4) -> io::Result<UdpSocket> {
    // Without SO_REUSEADDR: on UDP it would let two processes share the port, one of them deaf.
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket.into())
}

fn remedy(protocol: Protocol, address: SocketAddrV4, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "stop what listens there: ss -Hlnp{} 'sport = :{}'",
            match protocol {
                Protocol::Tcp => "t",
                Protocol::Udp => "u",
            },
            address.port()
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "the virtual IP {} must be configured on an interface of this host",
            address.ip()
        ),
        io::ErrorKind::PermissionDenied => {
            "run as root, or grant CAP_NET_BIND_SERVICE for ports below 1024".to_owned()
        }
        _ => "see the system's message".to_owned(),
    }
}
