//! Serves one control stream at the server: reads the request and runs the session.

use tokio::time::timeout;

use super::receiving::serve_push;
use super::request::{hello, refuse};
use super::sending::serve_pull;
use super::serve_list::serve_list;
use super::server_context::ServerContext;
use crate::error::{Code, Reason, Result};
use crate::net::stream::{MessageStream, StreamError};
use crate::protocol::{Hello, List, Message, Pull, Push};

/// Serves a session from its request to its end. It is refused as busy if `room` is false.
pub(crate) async fn serve(
    server: &ServerContext,
    mut control: MessageStream,
    room: bool,
) -> Result<()> {
    let deadline = server.context.config.deadline;
    let request = async {
        control.reader.read::<Hello>().await?;
        let frame = control.reader.frame(Pull::LIMIT).await?;
        frame.ok_or(StreamError::Ended)
    };
    let request = timeout(deadline, request)
        .await
        .map_err(|_| StreamError::TimedOut)??;
    control.writer.write_within(&hello(), deadline).await?;
    let refused = match request.kind {
        _ if !room => Reason::new(
            Code::Busy,
            "too many sessions on this connection; try again later",
        ),
        Push::TYPE => {
            let push: Push = request.decode().map_err(StreamError::from)?;
            return serve_push(server, push, control).await;
        }
        Pull::TYPE => {
            let pull: Pull = request.decode().map_err(StreamError::from)?;
            return serve_pull(server, pull, control).await;
        }
        List::TYPE => {
            let list: List = request.decode().map_err(StreamError::from)?;
            return serve_list(server, list, control).await;
        }
        _ => Reason::new(
            Code::Unsupported,
            "this server does not know the request; update haul on the server",
        ),
    };
    refuse(control.writer, refused, deadline).await
}
