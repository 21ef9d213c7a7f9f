//! Serves one control stream at the server: reads the request and runs the session.

use tokio::time::timeout;

use super::receiving::serve_push;
use super::request::{hello, refuse};
use super::sending::serve_pull;
use super::serve_list::serve_list;
use super::server_context::ServerContext;
use crate::error::{Code, Reason, Result};
use crate::net::stream::{MessageStream, StreamError};
use crate::protocol::{Frame, Hello, List, Message, Pull, Push};

/// Serves a session from its request to its end. It is refused as busy if `room` is false.
pub(crate) async fn serve(
    server: &ServerContext,
    mut control: MessageStream,
    room: bool,
) -> Result<()> {
    let deadline = server.context.config.deadline;
    let connection = &server.context.connection;
    let request = async {
        let reader = &mut control.reader;
        let hello = connection.read_head_frame(reader, Hello::LIMIT).await?;
        hello.decode::<Hello>()?;
        let request = connection.read_head_frame(reader, Pull::LIMIT).await?;
        if room {
            Request::decode(&request)
        } else {
            // Its bytes are dropped here: a refusal may wait for the client.
            Ok(Request::Refused(Reason::new(
                Code::Busy,
                "too many sessions on this connection; try again later",
            )))
        }
    };
    let request = timeout(deadline, request)
        .await
        .map_err(|_| StreamError::TimedOut)??;
    control.reader.read_in_large_pieces();
    control.writer.write_within(&hello(), deadline).await?;
    match request {
        Request::Push(push) => serve_push(server, *push, control).await,
        Request::Pull(pull) => serve_pull(server, *pull, control).await,
        Request::List(list) => serve_list(server, *list, control).await,
        Request::Refused(why) => refuse(control.writer, why, deadline).await,
    }
}

/// What a client asks for.
enum Request {
    Push(Box<Push>),
    Pull(Box<Pull>),
    List(Box<List>),
    Refused(Reason),
}

impl Request {
    fn decode(frame: &Frame) -> Result<Self, StreamError> {
        Ok(match frame.kind {
            Push::TYPE => Self::Push(Box::new(frame.decode()?)),
            Pull::TYPE => Self::Pull(Box::new(frame.decode()?)),
            List::TYPE => Self::List(Box::new(frame.decode()?)),
            _ => Self::Refused(Reason::new(
                Code::Unsupported,
                "this server does not know the request; update haul on the server",
            )),
        })
    }
}
