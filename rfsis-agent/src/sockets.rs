//! The kernel's TCP sockets of the VIP, whoever made them (sock_diag(7)): which there are, and the end of
//! those that are stale.
//!
//! What a killed agent had open, the kernel goes on closing: it repeats FINs and data that the gate drops,
//! until the gate opens again, in another epoch, for a connection that has long lived elsewhere. So a node
//! that is standby destroys them (`SOCK_DESTROY`). The RST that each sends by that does not pass the gate.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use futures_util::StreamExt as _;
use netlink_packet_sock_diag::constants::{AF_INET, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rfsis_common::maps::{FlowKey, State};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::proto::{ConnectionHandle, new_connection};
use rtnetlink::sys::{SocketAddr, protocols::NETLINK_SOCK_DIAG};
use tokio::sync::watch;

/// A TCP socket of the VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VipSocket {
    /// Its connection.
    pub flow: FlowKey,
    id: SocketId,
}

/// Which sockets are meant.
#[derive(Clone, Debug)]
pub struct VipSockets {
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// TCP ports of the services.
    pub ports: Vec<u16>,
}

/// Connections that may still move a byte. Not what waits only for time to pass, which `SOCK_DESTROY` of
/// older kernels refuses.
fn all_connections() -> StateFlags {
    StateFlags::all() - StateFlags::LISTEN - StateFlags::CLOSE - StateFlags::TIME_WAIT
}

impl VipSockets {
    /// Those of connections that both sides, or the server, may still send on.
    ///
    /// # Errors
    /// Of the netlink socket; `NotFound` where the kernel has no `CONFIG_INET_DIAG`.
    pub async fn open(&self) -> io::Result<Vec<VipSocket>> {
        self.list(StateFlags::ESTABLISHED | StateFlags::CLOSE_WAIT)
            .await
    }

    async fn list(&self, states: StateFlags) -> io::Result<Vec<VipSocket>> {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family: AF_INET,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states,
            socket_id: SocketId::new_v4(),
        });
        let mut found = Vec::new();
        Netlink::connect()?
            .ask(request, NLM_F_REQUEST | NLM_F_DUMP, |message| {
                if let SockDiagMessage::InetResponse(response) = message {
                    found.extend(self.recognise(response.header.socket_id));
                }
            })
            .await?;
        Ok(found)
    }

    fn recognise(&self, id: SocketId) -> Option<VipSocket> {
        let (IpAddr::V4(own), IpAddr::V4(client)) = (id.source_address, id.destination_address)
        else {
            return None;
        };
        let flow = FlowKey {
            client_addr: u32::from(client),
            client_port: id.destination_port,
            service_port: id.source_port,
        };
        (own == self.vip && self.ports.contains(&id.source_port)).then_some(VipSocket { flow, id })
    }

    /// Destroys them all, as long as `state` stays what it is: standby. Returns how many there were.
    ///
    /// # Errors
    /// Of the netlink socket; `Unsupported` where the kernel has no `CONFIG_INET_DIAG_DESTROY`, `NotFound`
    /// where it has no `CONFIG_INET_DIAG`.
    pub async fn destroy(&self, state: &mut watch::Receiver<State>) -> io::Result<usize> {
        let stale = self.list(all_connections()).await?;
        let netlink = Netlink::connect()?;
        let mut destroyed = 0;
        for socket in stale {
            // They were listed while the node was standby, so none is a connection of a later epoch; but
            // then its clients should not have to wait for this.
            if state.has_changed().unwrap_or(true) {
                break;
            }
            let request = SockDiagMessage::InetRequest(InetRequest {
                family: AF_INET,
                protocol: IPPROTO_TCP,
                extensions: ExtensionFlags::empty(),
                states: StateFlags::empty(),
                socket_id: socket.id,
            });
            let flags = NLM_F_REQUEST | NLM_F_ACK;
            match netlink
                .ask(SockDiagDestroy::new(request), flags, |_| {})
                .await
            {
                Ok(()) => destroyed += 1,
                // It ended by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(destroyed)
    }
}

impl VipSocket {
    /// Its ends, for a log: client, and service port.
    pub fn client(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::from(self.flow.client_addr), self.flow.client_port)
    }
}

/// A netlink socket for messages of one type, and the task that serves it.
struct Netlink<M: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug> {
    handle: ConnectionHandle<M>,
    task: tokio::task::JoinHandle<()>,
}

impl<M> Netlink<M>
where
    M: NetlinkSerializable
        + NetlinkDeserializable
        + std::fmt::Debug
        + Unpin
        + Send
        + Sync
        + 'static,
    NetlinkPayload<M>: From<M>,
{
    fn connect() -> io::Result<Self> {
        let (connection, handle, _) = new_connection::<M>(NETLINK_SOCK_DIAG)?;
        let task = tokio::spawn(connection);
        Ok(Self { handle, task })
    }

    async fn ask(&self, message: M, flags: u16, mut take: impl FnMut(M)) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let request = NetlinkMessage::new(header, message.into());
        let answers = self.handle.request(request, SocketAddr::new(0, 0));
        let mut answers = answers.map_err(io::Error::other)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => take(message),
                // An acknowledgement is an error without a code.
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                _ => {}
            }
        }
        Ok(())
    }
}

impl<M: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug> Drop for Netlink<M> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Destroys what is stale at once, and whenever the node becomes standby. Ends with the agent.
pub async fn destroy_stale(sockets: VipSockets, mut state: watch::Receiver<State>) {
    loop {
        if *state.borrow_and_update() != State::Active {
            match sockets.destroy(&mut state).await {
                Ok(0) => {}
                Ok(sockets) => tracing::info!(sockets, "destroyed stale sockets of the VIP"),
                Err(error) => {
                    let needs = match error.kind() {
                        io::ErrorKind::Unsupported => "CONFIG_INET_DIAG_DESTROY",
                        _ => "CONFIG_INET_DIAG",
                    };
                    tracing::warn!(%error, needs, "cannot destroy stale sockets of the VIP: those of a killed agent may speak when this node is active again");
                }
            }
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A service on the loopback, and two clients that have said something.
    fn connections(port_of: &TcpListener) -> Vec<(TcpStream, TcpStream)> {
        let address = port_of.local_addr().unwrap();
        let mut pairs = Vec::new();
        for _ in 0..2 {
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(b"x").unwrap();
            pairs.push((client, port_of.accept().unwrap().0));
        }
        pairs
    }

    #[tokio::test]
    async fn open_connections_of_the_services_are_listed_and_no_others() {
        let vip = Ipv4Addr::new(127, 0, 0, 91);
        let [service, other] = [(); 2].map(|()| TcpListener::bind((vip, 0)).unwrap());
        let (served, _others) = (connections(&service), connections(&other));
        let port = service.local_addr().unwrap().port();
        let sockets = VipSockets {
            vip,
            ports: vec![port],
        };
        let mut found: Vec<_> = sockets.open().await.unwrap();
        found.sort_by_key(|socket| socket.flow);
        let mut expected: Vec<_> = served
            .iter()
            .map(|(client, _)| client.local_addr().unwrap().to_string())
            .collect();
        expected.sort();
        let mut clients: Vec<_> = found.iter().map(|s| s.client().to_string()).collect();
        clients.sort();
        assert_eq!(clients, expected);
        assert!(found.iter().all(|s| s.flow.service_port == port));
        let elsewhere = VipSockets {
            vip: Ipv4Addr::new(127, 0, 0, 92),
            ..sockets
        };
        assert_eq!(elsewhere.open().await.unwrap(), []);
    }
}
