//! The network interface of a hop: its link, addresses and kernel parameters, by rtnetlink.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{Stream, TryStreamExt as _};
use ipnetwork::IpNetwork;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{Handle, LinkUnspec, LinkWireguard, RouteMessageBuilder};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::address::{Ends, Taken};
use super::error::{Error, Result};

/// The kernel answers at once; whatever takes this long never comes.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many packets may wait for the device process. The default of a tun, 500, is overrun by a
/// release of held packets while the process has not been scheduled yet; what does not fit is lost.
/// A release may be tens of thousands of small ones. Streams do not fill this: what they have under
/// way is bounded by their windows. No more than the kernel takes: recent ones (seen in Debian's 6.12.118)
/// refuse what does not fit in 15 bits, as "out of range".
const QUEUE_LENGTH: u32 = i16::MAX as u32;

/// What the kernel has to be told for an interface of ours; all of it goes with the interface.
///
/// ip-sysctl.rst in the kernel's documentation says what each does.
const PARAMETERS_V4: [(&str, &str); 6] = [
    // Packets come in whose way back is another interface (the anchor's own bridge, the other
    // host's uplink): loose, not strict. The larger of this and `all` counts, and 2 is the largest.
    ("rp_filter", "2"),
    ("forwarding", "1"),
    // What comes from a peer that has an address of this host's too (`conntrack::alias`): without
    // it, the kernel takes such a source for a lie. The guard knows better what may come out.
    ("accept_local", "1"),
    // A program of this host that is connected by 127.0.0.1: this is the address of its packets,
    // before their source and after their destination was translated, when their way is looked for.
    ("route_localnet", "1"),
    // A peer steers nothing but what is handed over to it.
    ("accept_redirects", "0"),
    ("send_redirects", "0"),
];

/// See [`PARAMETERS_V4`].
const PARAMETERS_V6: [(&str, &str); 5] = [
    ("disable_ipv6", "0"),
    // No link-local address (IN6_ADDR_GEN_MODE_NONE), so no neighbour discovery through the tunnel.
    ("addr_gen_mode", "1"),
    ("accept_ra", "0"),
    ("accept_redirects", "0"),
    ("forwarding", "1"),
];

/// A connection to the kernel's routing socket, for one interface of ours.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    interface: String,
    // Its task ends with it.
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Opens the socket, in the network namespace of the calling thread.
    pub(super) fn open(interface: &str) -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| Error::Netlink {
                action: "open a routing socket".into(),
                interface: interface.into(),
                source,
            })?;
        Ok(Self {
            handle,
            interface: interface.into(),
            connection: tokio::spawn(connection),
        })
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs one request, bounded, and says what it was for if it fails.
    pub(super) async fn request<T>(
        &self,
        action: impl Into<String>,
        request: impl Future<Output = Result<T, rtnetlink::Error>>,
    ) -> Result<T> {
        let answer = match tokio::time::timeout(PATIENCE, request).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(rtnetlink::Error::NetlinkError(message))) => message.to_io(),
            Ok(Err(error)) => io::Error::other(error),
            Err(_) => io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer"),
        };
        Err(Error::Netlink {
            action: action.into(),
            interface: self.interface.clone(),
            source: answer,
        })
    }

    /// Like [`Netlink::request`]; an error of one of these numbers is as good as success.
    pub(super) async fn request_unless(
        &self,
        done: &[rustix::io::Errno],
        action: impl Into<String>,
        request: impl Future<Output = Result<(), rtnetlink::Error>>,
    ) -> Result<()> {
        match self.request(action, request).await {
            Err(Error::Netlink { source, .. })
                if done
                    .iter()
                    .any(|errno| source.raw_os_error() == Some(errno.raw_os_error())) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// The interface as the kernel knows it, if it exists.
    pub(super) async fn link(&self) -> Result<Option<LinkMessage>> {
        let request = self
            .handle
            .link()
            .get()
            .match_name(&self.interface)
            .execute();
        let mut request = std::pin::pin!(request);
        match self
            .request("look for the interface", request.try_next())
            .await
        {
            Err(Error::Netlink { source, .. })
                if source.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) =>
            {
                Ok(None)
            }
            other => other,
        }
    }

    /// The index of the interface, which must exist.
    pub(super) async fn index(&self) -> Result<u32> {
        let link = self.link().await?.ok_or_else(|| Error::Netlink {
            action: "find the interface".into(),
            interface: self.interface.clone(),
            source: io::Error::from(rustix::io::Errno::NODEV),
        })?;
        Ok(link.header.index)
    }

    /// Makes a kernel WireGuard interface; one that exists already is fine.
    pub(super) async fn add_wireguard(&self) -> Result<()> {
        let link = LinkWireguard::new(&self.interface).build();
        self.request_unless(
            &[rustix::io::Errno::EXIST],
            "create a WireGuard interface",
            self.handle.link().add(link).execute(),
        )
        .await
    }

    /// Switches the interface on.
    pub(super) async fn switch_on(&self) -> Result<()> {
        let link = LinkUnspec::new_with_index(self.index().await?).up().build();
        let set = self.handle.link().set(link).execute();
        self.request("switch the interface on", set).await
    }

    /// The networks that the host's interfaces are in, all of them.
    pub(super) async fn networks(&self) -> Result<Vec<IpNetwork>> {
        let mut networks = Vec::new();
        let addresses = self.handle.address().get().execute();
        let list = each(addresses, |message| networks.extend(address_of(&message)));
        self.request("list the host's addresses", list).await?;
        Ok(networks)
    }

    /// Gives the interface its size of packets and a queue, and switches it on.
    pub(super) async fn bring_up(&self, mtu: u16) -> Result<()> {
        let link = LinkUnspec::new_with_index(self.index().await?)
            .mtu(mtu.into())
            .txqueuelen(QUEUE_LENGTH)
            .up()
            .build();
        self.request(
            "switch the interface on",
            self.handle.link().set(link).execute(),
        )
        .await
    }

    /// Removes the interface, if it exists.
    pub(super) async fn remove(&self) -> Result<()> {
        let Some(link) = self.link().await? else {
            return Ok(());
        };
        self.request_unless(
            &[rustix::io::Errno::NODEV],
            "remove the interface",
            self.handle.link().del(link.header.index).execute(),
        )
        .await
    }

    /// Gives the interface these addresses and no others.
    pub(super) async fn set_addresses(&self, ends: &[Ends]) -> Result<()> {
        let index = self.index().await?;
        let old: Vec<AddressMessage> = self
            .request(
                "list the addresses",
                self.handle
                    .address()
                    .get()
                    .set_link_index_filter(index)
                    .execute()
                    .try_collect(),
            )
            .await?;
        let mut kept = Vec::new();
        for message in old {
            let network = address_of(&message);
            if let Some(end) = ends.iter().find(|end| {
                network.is_some_and(|n| n.ip() == end.local && n.prefix() == end.prefix())
            }) {
                kept.push(end.local);
            } else {
                self.request_unless(
                    &[rustix::io::Errno::ADDRNOTAVAIL],
                    "remove an old address",
                    self.handle.address().del(message).execute(),
                )
                .await?;
            }
        }
        for end in ends.iter().filter(|end| !kept.contains(&end.local)) {
            let mut request = self.handle.address().add(index, end.local, end.prefix());
            if end.local.is_ipv6() {
                // There is nobody on a point-to-point link to ask; until duplicate detection gave
                // up, the address could not be used.
                request
                    .message_mut()
                    .attributes
                    .push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            self.request_unless(
                &[rustix::io::Errno::EXIST],
                format!("add the address {}/{}", end.local, end.prefix()),
                request.execute(),
            )
            .await?;
        }
        Ok(())
    }

    /// The networks that this host knows: its addresses and routes of all tables, other than ways
    /// out. Those of the hop itself do not count.
    pub(super) async fn taken(&self) -> Result<Taken> {
        let own = self.link().await?.map(|link| link.header.index);
        let mut taken = Taken::default();
        let addresses = self.handle.address().get().execute();
        self.request(
            "list the host's addresses",
            each(addresses, |message| {
                if Some(message.header.index) != own
                    && let Some(network) = address_of(&message)
                {
                    taken.add(network);
                }
            }),
        )
        .await?;
        for query in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let routes = self.handle.route().get(query).execute();
            self.request(
                "list the host's routes",
                each(routes, |message| {
                    let of_own_interface = message.attributes.iter().any(
                        |attribute| matches!(attribute, RouteAttribute::Oif(index) if Some(*index) == own),
                    );
                    if !of_own_interface
                        && let Some(network) = destination_of(&message)
                    {
                        taken.add(network);
                    }
                }),
            )
            .await?;
        }
        Ok(taken)
    }
}

/// Looks at each message of a dump, of which there may be many, without keeping them.
async fn each<T>(
    messages: impl Stream<Item = Result<T, rtnetlink::Error>>,
    mut look: impl FnMut(T),
) -> Result<(), rtnetlink::Error> {
    let mut messages = std::pin::pin!(messages);
    while let Some(message) = messages.try_next().await? {
        look(message);
    }
    Ok(())
}

fn address_of(message: &AddressMessage) -> Option<IpNetwork> {
    // On a point-to-point interface `Address` is the other end's and `Local` is ours.
    let find = |local: bool| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(address) if local => Some(*address),
                AddressAttribute::Address(address) if !local => Some(*address),
                _ => None,
            })
    };
    let address = find(true).or_else(|| find(false))?;
    IpNetwork::new(address, message.header.prefix_len).ok()
}

fn destination_of(message: &RouteMessage) -> Option<IpNetwork> {
    let address: IpAddr = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some((*address).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some((*address).into()),
            _ => None,
        })?;
    IpNetwork::new(address, message.header.destination_prefix_length).ok()
}

/// Whether an interface of this name exists in the network namespace of the calling thread.
pub(super) fn exists(interface: &str) -> bool {
    let Ok(socket) = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    ) else {
        return false;
    };
    rustix::net::netdevice::name_to_index(&socket, interface).is_ok()
}

/// The index of an interface in the network namespace of the calling thread.
pub(super) fn index_of(interface: &str) -> Option<u32> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .ok()?;
    rustix::net::netdevice::name_to_index(&socket, interface).ok()
}

/// Whether this host has IPv6.
pub(super) fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6/conf/all/disable_ipv6").exists()
}

/// Checks that the host forwards packets at all.
///
/// # Errors
/// [`Error::NotForwarding`].
pub(crate) fn check_forwarding() -> Result<()> {
    let path = Path::new("/proc/sys/net/ipv4/ip_forward");
    let value = std::fs::read_to_string(path).map_err(super::error::file("read", path))?;
    if value.trim() == "0" {
        return Err(Error::NotForwarding);
    }
    Ok(())
}

/// Sets the kernel parameters of the interface.
pub(super) fn set_parameters(interface: &str) -> Result<()> {
    let set = |family: &str, parameters: &[(&str, &'static str)]| {
        for (name, value) in parameters {
            let path: PathBuf = ["/proc/sys/net", family, "conf", interface, name]
                .iter()
                .collect();
            std::fs::write(&path, value).map_err(|source| Error::Sysctl {
                path,
                value,
                source,
            })?;
        }
        Ok(())
    };
    set("ipv4", &PARAMETERS_V4)?;
    if has_ipv6() {
        set("ipv6", &PARAMETERS_V6)?;
    }
    Ok(())
}
