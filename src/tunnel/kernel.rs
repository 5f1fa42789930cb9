//! WireGuard in the kernel, configured through generic netlink.

use std::time::{Duration, SystemTime};

use wireguard_uapi::{DeviceInterface, WgSocket, set};

use super::error::Result;
use super::key::PrivateKey;
use super::{Configuration, Status, bounded};

/// Whether this kernel has WireGuard. Asking loads the module where there is one.
pub(super) fn is_available() -> bool {
    WgSocket::connect().is_ok()
}

/// Gives the interface its key and port.
pub(super) async fn set_key(interface: &str, key: &PrivateKey, port: u16) -> Result<()> {
    let name = interface.to_owned();
    let key = key.expose();
    bounded("set the key", interface, move || {
        let device = set::Device::from_ifname(name)
            .private_key(&key)
            .listen_port(port);
        // Only ever the Display of these errors: Debug shows the request, which holds the key.
        let mut socket = WgSocket::connect().map_err(|error| error.to_string())?;
        socket.set_device(device).map_err(|error| error.to_string())
    })
    .await
}

/// Gives the interface its only peer.
pub(super) async fn set_peer(interface: &str, peer: Configuration) -> Result<()> {
    let name = interface.to_owned();
    bounded("set the peer", interface, move || {
        let everything = super::everything();
        let allowed = everything
            .iter()
            .map(|address| set::AllowedIp {
                ipaddr: address,
                cidr_mask: Some(0),
            })
            .collect();
        let entry = set::Peer::from_public_key(peer.key.as_bytes())
            .flags(vec![set::WgPeerF::ReplaceAllowedIps])
            .endpoint(&peer.endpoint)
            .persistent_keepalive_interval(peer.keepalive)
            .allowed_ips(allowed);
        let device = set::Device::from_ifname(name)
            .flags(vec![set::WgDeviceF::ReplacePeers])
            .peers(vec![entry]);
        let mut socket = WgSocket::connect().map_err(|error| error.to_string())?;
        socket.set_device(device).map_err(|error| error.to_string())
    })
    .await
}

/// What the interface counted.
pub(super) async fn status(interface: &str) -> Result<Status> {
    let name = interface.to_owned();
    let device = bounded("read the state", interface, move || {
        let mut socket = WgSocket::connect().map_err(|error| error.to_string())?;
        socket
            .get_device(DeviceInterface::from_name(name))
            .map_err(|error| error.to_string())
    })
    .await?;
    Ok(Status::of(&device.peers))
}

impl Status {
    /// The state of the only peer; all zero while there is none.
    pub(super) fn of(peers: &[wireguard_uapi::get::Peer]) -> Self {
        let Some(peer) = peers.first() else {
            return Self::default();
        };
        Self {
            rx_bytes: peer.rx_bytes,
            tx_bytes: peer.tx_bytes,
            last_handshake: (peer.last_handshake_time > Duration::ZERO)
                .then(|| SystemTime::UNIX_EPOCH + peer.last_handshake_time),
        }
    }
}
