//! The interface that carries the VIP: addresses, routes, neighbours (rtnetlink).

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::bpf::XdpMode;

/// `IFA_PROTO` of a VIP that the agent configured ("R"): a later run knows by it what to remove. Values
/// up to 3 are the kernel's (`include/uapi/linux/if_addr.h`).
const ADDRESS_PROTOCOL: u8 = 0x52;

/// Why the interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetifError {
    /// There is no such interface.
    #[error("interface {name} does not exist; found {}", listed(.existing))]
    InterfaceMissing {
        /// The name looked for.
        name: String,
        /// The names that there are.
        existing: Vec<String>,
    },
    /// Heartbeats and announcements are ARP: they need Ethernet.
    #[error("interface {name} is of link type {found}; expected Ethernet")]
    NotEthernet {
        /// The interface.
        name: String,
        /// Its type, as the kernel calls it.
        found: String,
    },
    /// None of the configured nodes is this host.
    #[error(
        "none of the nodes {} and {} is an address of this host; found {}; configure one of them on an \
         interface, or correct `nodes`", .nodes[0], .nodes[1], listed(.found)
    )]
    NotANode {
        /// The configured addresses.
        nodes: [Ipv4Addr; 2],
        /// The addresses of this host.
        found: Vec<Ipv4Addr>,
    },
    /// Both configured nodes are this host.
    #[error(
        "both nodes {} and {} are addresses of this host; expected one of them to be the peer's",
        .nodes[0], .nodes[1]
    )]
    BothNodes {
        /// The configured addresses.
        nodes: [Ipv4Addr; 2],
    },
    /// The VIP would not be reachable on this LAN.
    #[error("VIP {vip} outside any subnet of {interface}: found {}", listed(.subnets))]
    VipOutside {
        /// The VIP.
        vip: Ipv4Addr,
        /// The interface.
        interface: String,
        /// Addresses and prefixes of the interface.
        subnets: Vec<Subnet>,
    },
    /// Changing addresses is not allowed.
    #[error("{operation}: not permitted; it needs root or CAP_NET_ADMIN")]
    Privilege {
        /// What was tried.
        operation: String,
    },
    /// The kernel refused.
    #[error("{operation}: {detail}")]
    Failed {
        /// What was tried.
        operation: String,
        /// What the kernel said.
        detail: String,
    },
}

impl NetifError {
    /// The process's exit code: 1 failed while running, 2 bad config, 3 missing privilege.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InterfaceMissing { .. }
            | Self::NotEthernet { .. }
            | Self::NotANode { .. }
            | Self::BothNodes { .. }
            | Self::VipOutside { .. } => 2,
            Self::Privilege { .. } => 3,
            Self::Failed { .. } => 1,
        }
    }

    fn new(operation: impl Into<String>, error: &rtnetlink::Error) -> Self {
        let operation = operation.into();
        match errno(error) {
            Some(libc::EPERM | libc::EACCES) => Self::Privilege { operation },
            Some(number) => Self::Failed {
                operation,
                detail: std::io::Error::from_raw_os_error(number).to_string(),
            },
            None => Self::Failed {
                operation,
                detail: error.to_string(),
            },
        }
    }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

/// For messages: `a, b, c`, or `none`.
pub(crate) fn listed<T: fmt::Display>(items: &[T]) -> String {
    if items.is_empty() {
        return "none".to_owned();
    }
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    items.join(", ")
}

/// Names of the interfaces that there are.
pub fn interface_names() -> Vec<String> {
    let Ok(interfaces) = nix::net::if_::if_nameindex() else {
        return Vec::new();
    };
    let names = interfaces.iter();
    names
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .collect()
}

/// An address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// The address itself.
    pub address: Ipv4Addr,
    /// 0–32.
    pub prefix_len: u8,
}

impl Subnet {
    /// Whether an address lies in the subnet.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let shift = 32_u32.saturating_sub(u32::from(self.prefix_len));
        let network = |address: Ipv4Addr| u32::from(address).checked_shr(shift).unwrap_or(0);
        network(self.address) == network(address)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

/// Native, but on a veth: an XDP program there makes the other end cut super-frames (`veth_xdp_set` in
/// drivers/net/veth.c takes `NETIF_F_GSO_SOFTWARE` from it), and one of 64 KiB is handled at the price of
/// some 45 frames. `docs/benchmarks.md` has what that costs.
fn xdp_mode(link: &LinkMessage) -> XdpMode {
    let mut info = link
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(info) => Some(info),
            _ => None,
        });
    if info.any(|info| info.contains(&LinkInfo::Kind(InfoKind::Veth))) {
        XdpMode::Tc
    } else {
        XdpMode::Native
    }
}

/// What [`Netif::add_vip`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VipAddress {
    /// It was not there and is now.
    Added,
    /// It was there: somebody else's, or left by an agent that died.
    AlreadyThere,
}

/// The interface that carries the VIP.
#[derive(Clone, Debug)]
pub struct Netif {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Bytes of payload per frame.
    pub mtu: u32,
    /// How frames are best caught there.
    pub xdp_mode: XdpMode,
    /// Its IPv4 addresses at the time of [`Netif::new`].
    pub addresses: Vec<Subnet>,
    handle: Handle,
}

impl Netif {
    /// Looks an interface up. One that is down is warned of, and left so.
    ///
    /// # Errors
    /// No such interface, or not Ethernet.
    pub async fn new(name: &str) -> Result<Self, NetifError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| NetifError::Failed {
                operation: "opening a netlink socket".to_owned(),
                detail: error.to_string(),
            })?;
        tokio::spawn(connection);

        let mut links = Box::pin(handle.link().get().match_name(name).execute());
        let link = match links.try_next().await {
            Ok(Some(link)) => link,
            Err(error) if !matches!(errno(&error), Some(libc::ENODEV | libc::ERANGE)) => {
                return Err(NetifError::new(
                    format!("looking up interface {name}"),
                    &error,
                ));
            }
            // ERANGE: longer than a name can be.
            Ok(None) | Err(_) => {
                return Err(NetifError::InterfaceMissing {
                    name: name.to_owned(),
                    existing: interface_names(),
                });
            }
        };
        drop(links);
        let (mac, mtu) = ethernet(name, &link)?;
        if !link.header.flags.contains(LinkFlags::Up) {
            tracing::warn!(
                interface = name,
                "interface is down; `ip link set {name} up`"
            );
        }
        let index = link.header.index;
        let addresses = addresses(&handle)
            .await?
            .iter()
            .filter(|message| message.header.index == index)
            .filter_map(subnet)
            .collect();
        Ok(Self {
            name: name.to_owned(),
            index,
            mac,
            mtu,
            xdp_mode: xdp_mode(&link),
            addresses,
            handle,
        })
    }

    /// Which of the two nodes this host is: 0 or 1, by the addresses of all its interfaces.
    ///
    /// # Errors
    /// Neither is, or both are.
    pub async fn own_node(&self, nodes: &[Ipv4Addr; 2]) -> Result<usize, NetifError> {
        let messages = addresses(&self.handle).await?;
        let found: Vec<Ipv4Addr> = messages
            .iter()
            .filter_map(subnet)
            .map(|subnet| subnet.address)
            .collect();
        match nodes.map(|node| found.contains(&node)) {
            [true, false] => Ok(0),
            [false, true] => Ok(1),
            [true, true] => Err(NetifError::BothNodes { nodes: *nodes }),
            [false, false] => Err(NetifError::NotANode {
                nodes: *nodes,
                found,
            }),
        }
    }

    /// Checks that the VIP lies in a subnet of one of the interface's own addresses.
    ///
    /// # Errors
    /// It does not.
    pub fn check_vip(&self, vip: Ipv4Addr) -> Result<(), NetifError> {
        let own = || self.addresses.iter().filter(|own| own.address != vip);
        if own().any(|own| own.contains(vip)) {
            return Ok(());
        }
        Err(NetifError::VipOutside {
            vip,
            interface: self.name.clone(),
            subnets: own().copied().collect(),
        })
    }

    /// Configures the VIP, marked as the agent's. The gate must be attached by now.
    ///
    /// # Errors
    /// Missing privilege; the kernel refuses.
    pub async fn add_vip(&self, vip: Ipv4Addr, prefix_len: u8) -> Result<VipAddress, NetifError> {
        let mut request = self
            .handle
            .address()
            .add(self.index, IpAddr::V4(vip), prefix_len);
        let mark = AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL));
        request.message_mut().attributes.push(mark);
        match request.execute().await {
            Ok(()) => Ok(VipAddress::Added),
            Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(VipAddress::AlreadyThere),
            Err(error) => {
                let operation = format!("adding {vip}/{prefix_len} to {}", self.name);
                Err(NetifError::new(operation, &error))
            }
        }
    }

    /// Removes the VIP where an agent configured it; gives whether it did.
    ///
    /// # Errors
    /// Missing privilege; the kernel refuses.
    pub async fn remove_vip_if_ours(&self, vip: Ipv4Addr) -> Result<bool, NetifError> {
        let mut removed = false;
        for message in addresses(&self.handle).await? {
            let here = message.header.index == self.index
                && subnet(&message).is_some_and(|subnet| subnet.address == vip);
            if !here || !is_marked(&message) {
                continue;
            }
            match self.handle.address().del(message).execute().await {
                Ok(()) => removed = true,
                Err(error) if errno(&error) == Some(libc::EADDRNOTAVAIL) => {}
                Err(error) => {
                    let operation = format!("removing {vip} from {}", self.name);
                    return Err(NetifError::new(operation, &error));
                }
            }
        }
        Ok(removed)
    }

    /// Has the kernel resolve, or confirm, the hardware address of the next hop to a client, so that a
    /// takeover need not wait for ARP. Gives the next hop.
    ///
    /// # Errors
    /// No route to the client, or missing privilege.
    pub async fn warm_next_hop(&self, client: Ipv4Addr) -> Result<Ipv4Addr, NetifError> {
        let failed = |error: rtnetlink::Error| {
            NetifError::new(format!("warming the way to {client}"), &error)
        };
        let (interface, next_hop) = self.next_hop(client).await.map_err(failed)?;
        // NTF_USE: `neigh_add` in net/core/neighbour.c begins to resolve as if there were a packet.
        let neighbours = self.handle.neighbours();
        let request = neighbours
            .add(interface, IpAddr::V4(next_hop))
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace();
        request.execute().await.map_err(failed)?;
        Ok(next_hop)
    }

    /// Forgets next hops to these clients that do not answer the kernel of a standby. Returns how many there were.
    ///
    /// What a former active's sockets sent behind a cut cable asks in the name of the VIP, which the gate does not
    /// pass; the kernel asks again only each second (`retrans_time_ms` of arp(7)), and the next takeover would wait
    /// for that. Other next hops are other programs': whoever waits for one would be refused.
    ///
    /// # Errors
    /// Missing privilege.
    pub async fn forget_unresolved(&self, clients: &[Ipv4Addr]) -> Result<usize, NetifError> {
        let failed =
            |error: rtnetlink::Error| NetifError::new("forgetting next hops to clients", &error);
        let neighbours = self.handle.neighbours().get();
        let mut found = Box::pin(neighbours.set_address_family(AddressFamily::Inet).execute());
        let mut unresolved = HashMap::new();
        while let Some(neighbour) = found.try_next().await.map_err(failed)? {
            let states = [NeighbourState::Incomplete, NeighbourState::Failed];
            if states.contains(&neighbour.header.state)
                && let Some(address) = next_hop_of(&neighbour)
            {
                unresolved.insert((neighbour.header.ifindex, address), neighbour);
            }
        }
        let mut forgotten = 0;
        for &client in clients {
            if unresolved.is_empty() {
                break;
            }
            // Without a route there is none; the others have theirs.
            let next_hop = self.next_hop(client).await.ok();
            let Some(neighbour) = next_hop.and_then(|hop| unresolved.remove(&hop)) else {
                continue;
            };
            match self.handle.neighbours().del(neighbour).execute().await {
                Ok(()) => forgotten += 1,
                // The kernel has given it up by now.
                Err(error) if errno(&error) == Some(libc::ENOENT) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(forgotten)
    }

    /// Interface and address of the next hop to a client.
    async fn next_hop(&self, client: Ipv4Addr) -> Result<(u32, Ipv4Addr), rtnetlink::Error> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(client, 32)
            .build();
        let mut routes = Box::pin(self.handle.route().get(query).execute());
        let route = routes.try_next().await?;
        let (mut interface, mut next_hop) = (self.index, client);
        for attribute in route.iter().flat_map(|route| &route.attributes) {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => next_hop = *gateway,
                RouteAttribute::Oif(index) => interface = *index,
                _ => {}
            }
        }
        Ok((interface, next_hop))
    }
}

fn next_hop_of(neighbour: &NeighbourMessage) -> Option<Ipv4Addr> {
    neighbour
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
            _ => None,
        })
}

/// Hardware address and MTU of an Ethernet link.
fn ethernet(name: &str, link: &LinkMessage) -> Result<([u8; 6], u32), NetifError> {
    let mut mac = None;
    let mut mtu = None;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(address) => mac = address.as_slice().try_into().ok(),
            LinkAttribute::Mtu(bytes) => mtu = Some(*bytes),
            _ => {}
        }
    }
    match (link.header.link_layer_type, mac, mtu) {
        (LinkLayerType::Ether, Some(mac), Some(mtu)) => Ok((mac, mtu)),
        (found, _, _) => Err(NetifError::NotEthernet {
            name: name.to_owned(),
            found: found.to_string(),
        }),
    }
}

/// All IPv4 addresses of the host.
async fn addresses(handle: &Handle) -> Result<Vec<AddressMessage>, NetifError> {
    let messages: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|error| NetifError::new("listing addresses", &error))?;
    Ok(messages)
}

/// `IFA_LOCAL` is the address itself; `IFA_ADDRESS` is the peer's on a point-to-point link.
fn subnet(message: &AddressMessage) -> Option<Subnet> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) => Some(Subnet {
                address: *address,
                prefix_len: message.header.prefix_len,
            }),
            _ => None,
        })
}

fn is_marked(message: &AddressMessage) -> bool {
    let mark = AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL));
    message.attributes.contains(&mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(address: [u8; 4], prefix_len: u8) -> Subnet {
        Subnet {
            address: address.into(),
            prefix_len,
        }
    }

    #[test]
    fn a_subnet_contains_what_shares_its_prefix() {
        let cases = [
            (subnet([192, 168, 1, 1], 24), [192, 168, 1, 100], true),
            (subnet([192, 168, 1, 1], 24), [192, 168, 2, 100], false),
            (subnet([192, 168, 1, 1], 25), [192, 168, 1, 128], false),
            (subnet([192, 168, 1, 1], 32), [192, 168, 1, 1], true),
            (subnet([192, 168, 1, 1], 32), [192, 168, 1, 2], false),
            (subnet([10, 0, 0, 1], 0), [192, 168, 1, 1], true),
        ];
        for (subnet, address, contained) in cases {
            let address = Ipv4Addr::from(address);
            assert_eq!(subnet.contains(address), contained, "{address} in {subnet}");
        }
    }

    #[test]
    fn messages_list_what_was_found() {
        assert_eq!(listed::<String>(&[]), "none");
        let error = NetifError::VipOutside {
            vip: Ipv4Addr::new(10, 0, 0, 9),
            interface: "eth0".to_owned(),
            subnets: vec![subnet([192, 168, 1, 1], 24), subnet([172, 16, 0, 1], 12)],
        };
        assert_eq!(
            error.to_string(),
            "VIP 10.0.0.9 outside any subnet of eth0: found 192.168.1.1/24, 172.16.0.1/12"
        );
        assert_eq!(error.exit_code(), 2);
    }
}
