//! What happens on a host, as Podman tells it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::stream::BoxStream;
use futures::{SinkExt, StreamExt};
use podman_api::opts::EventsOpts;

use super::client::{Client, from_api};
use super::error::Result;
use super::request::{Purpose, owning};

/// Events, as they come. Dropping it closes the connection.
pub type EventStream = BoxStream<'static, Result<Event>>;

/// Something that happened to a container, an image, a volume...
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// To what kind of thing: `container`, `image`, `volume`, `network`, `pod`, `system`.
    pub kind: String,
    /// What: `create`, `start`, `died`, `checkpoint`, `restore`, `remove`...
    pub action: String,
    /// The thing's ID; empty for a volume.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When.
    pub time: SystemTime,
    /// What else Podman says, labels included.
    pub attributes: BTreeMap<String, String>,
}

impl Event {
    pub(super) fn read(event: podman_api::models::Event) -> Event {
        let attributes: BTreeMap<String, String> = event.actor.attributes.into_iter().collect();
        Event {
            kind: event.typ,
            action: event.action,
            id: event.actor.id,
            name: attributes.get("name").cloned().unwrap_or_default(),
            time: UNIX_EPOCH + Duration::from_nanos(event.time_nano),
            attributes,
        }
    }
}

impl Client {
    /// What happens on this host from now on.
    ///
    /// Podman is first asked when the stream is first polled, for everything since the *second*
    /// of this call: nothing is missed in between, but something that happened in the same second
    /// before it may come, too. There is no time-out on the next event.
    ///
    /// # Errors
    /// When the socket cannot be connected to; in the stream, when the connection fails.
    pub async fn events(&self) -> Result<EventStream> {
        let purpose = Purpose::new("watch", "Podman's events");
        drop(self.socket.connect(&purpose).await?);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let api = self.api.clone();
        Ok(owning(|mut sender| async move {
            let options = EventsOpts::builder()
                .since(now.to_string())
                .stream(true)
                .build();
            let mut events = api.events(&options);
            while let Some(event) = events.next().await {
                let event = event
                    .map(Event::read)
                    .map_err(|error| from_api(&purpose, error));
                let over = event.is_err();
                if sender.send(event).await.is_err() || over {
                    return;
                }
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Podman 5.8.6 told them.
    #[test]
    fn reads_events() {
        let start = serde_json::from_str(
            r#"{"status":"start","id":"03b937775c675044a8d8318648e359162a77629f573bc0e35d841b023fbfaba0",
            "from":"localhost/bb:1","Type":"container","Action":"start","Actor":{"ID":
            "03b937775c675044a8d8318648e359162a77629f573bc0e35d841b023fbfaba0","Attributes":{"image":
            "localhost/bb:1","name":"ulog","podId":""}},"scope":"local","time":1795379033,"timeNano":1795379033293532666}"#,
        )
        .unwrap();
        let start = Event::read(start);
        assert_eq!(
            (
                start.kind.as_str(),
                start.action.as_str(),
                start.name.as_str()
            ),
            ("container", "start", "ulog")
        );
        assert_eq!(
            start.time,
            UNIX_EPOCH + Duration::from_nanos(1_795_379_033_293_532_666)
        );
        let volume = serde_json::from_str(
            r#"{"status":"create","Type":"volume","Action":"create","Actor":{"ID":"","Attributes":
            {"image":"","name":"uvol","podId":""}},"scope":"local","time":1795379033,"timeNano":1795379033175792377}"#,
        )
        .unwrap();
        assert_eq!(Event::read(volume).name, "uvol");
    }
}
