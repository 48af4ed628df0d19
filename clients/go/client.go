// Package keyturn asks the Keyturn sidecar whose credential pays for an LLM request: the user's own provider key, or
// the platform's credits.
//
// A gateway makes one [Client] for the life of its process, and for each request a [Call]: [Client.Request] decides,
// and what became of the request is recorded when the call ends.
package keyturn

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

// Version is that of this client.
const Version = "0.1.0"

// Options say how to reach the sidecar, and the defaults of calls. The zero Options reach the sidecar of this machine.
type Options struct {
	// Target is unix:PATH, unix:///PATH or HOST:PORT. Empty: the environment variable KEYTURN_ADDRESS, else the socket
	// where a sidecar of this machine listens by default.
	Target string
	// Token is a bearer token. The zero Secret is none; one that is made of an empty text is refused.
	Token Secret
	// RootCertificates are the authorities to trust, in PEM; they turn TLS on.
	RootCertificates []byte
	// CertificateChain and PrivateKey are the client certificate of mutual TLS, in PEM; they turn TLS on.
	CertificateChain []byte
	PrivateKey       Secret
	// TLS turns TLS on with the authorities of the system.
	TLS bool
	// Timeout is the deadline of every call that is given none of its own, retries included. 0: 2 s.
	Timeout time.Duration
	Retries Retries
	// QueueSize is how many records the queue in the background holds. 0: 10,000.
	QueueSize int
	// CloseTimeout is how long Close goes on sending records. 0: 5 s.
	CloseTimeout time.Duration
	// WhenDown is asked when a decision ended as ErrUnavailable. True lets the request go ahead unmetered, on the
	// platform's own credential; what it returns as an error is returned. Nil: the call fails with the fault.
	WhenDown func(ctx context.Context, request DecideRequest, fault *Error) (bool, error) `json:"-"`
	// OnUnsent is given every record in the background that did not get through. It is called by the goroutine that sends
	// them, or that ends a call, and must not wait for Flush or Close. Nil: a line in slog's default log.
	OnUnsent func(Unsent) `json:"-"`
}

// A Client is a connection to one sidecar, safe for many goroutines. Nothing connects before the first call.
//
// Its methods return an *Error for a fault, ErrInvalid for what cannot be sent, ErrClosed once it is closed, and an error
// that is context.Canceled when their context was canceled.
type Client struct {
	target     string
	connection *grpc.ClientConn
	routing    keyturnv1.RoutingServiceClient
	bearer     Secret
	timeout    time.Duration
	retries    Retries
	whenDown   func(context.Context, DecideRequest, *Error) (bool, error)
	outbox     *outbox

	down    atomic.Bool   // all attempts of a call found nobody there: until one is answered, each call makes one
	closing atomic.Bool   // no new calls
	closed  chan struct{} // no calls at all
	closes  sync.Once
}

// NewClient makes a client. It is ErrInvalid, and says which option it is, when that cannot work.
func NewClient(options Options) (*Client, error) {
	for name, number := range map[string]int64{
		"Timeout": int64(options.Timeout), "QueueSize": int64(options.QueueSize),
		"CloseTimeout": int64(options.CloseTimeout), "Retries.Attempts": int64(options.Retries.Attempts),
		"Retries.FirstDelay": int64(options.Retries.FirstDelay), "Retries.MaxDelay": int64(options.Retries.MaxDelay),
	} {
		if number < 0 {
			return nil, invalid("%s is below zero", name)
		}
	}
	carried, err := bearer(options.Token)
	if err != nil {
		return nil, err
	}
	connection, target, err := connect(options)
	if err != nil {
		return nil, err
	}
	c := &Client{
		target:     target,
		connection: connection,
		routing:    keyturnv1.NewRoutingServiceClient(connection),
		bearer:     carried,
		timeout:    given(options.Timeout, 2*time.Second),
		retries:    options.Retries.withDefaults(),
		whenDown:   options.WhenDown,
		closed:     make(chan struct{}),
	}
	c.outbox = newOutbox(c.sendBatch, options.OnUnsent, c.retries, given(options.QueueSize, 10_000),
		given(options.CloseTimeout, 5*time.Second))
	return c, nil
}

// Format writes the client's target, for every verb.
func (c *Client) Format(state fmt.State, _ rune) { write(state, "keyturn.Client("+c.target+")") }

// LogValue returns the client's target.
func (c *Client) LogValue() slog.Value { return slog.StringValue("keyturn.Client(" + c.target + ")") }

// Close takes no more calls and records, goes on sending the records in the background for up to Options.CloseTimeout,
// and closes the connection. It returns the records that were left, which went to Options.OnUnsent too.
func (c *Client) Close() []Unsent {
	var left []Unsent
	c.closes.Do(func() {
		c.closing.Store(true)
		left = c.outbox.close()
		close(c.closed)
		_ = c.connection.Close() // its one error is that it is closed already
	})
	return left
}

// A CallOption changes how one call is made.
type CallOption func(*callSettings)

type callSettings struct{ timeout time.Duration }

// WithTimeout is the deadline of one call, retries included, instead of Options.Timeout. The context's own deadline holds
// besides.
func WithTimeout(timeout time.Duration) CallOption {
	return func(settings *callSettings) { settings.timeout = timeout }
}

// begin checks that calls are taken, and returns the timeout of this one.
func (c *Client) begin(options []CallOption) (time.Duration, error) {
	settings := callSettings{timeout: c.timeout}
	for _, option := range options {
		option(&settings)
	}
	switch {
	case c.closing.Load():
		return 0, ErrClosed
	case settings.timeout <= 0:
		return 0, invalid("a timeout is more than zero")
	}
	return settings.timeout, nil
}

// Decide asks whose credential pays for a request. A denial is an answer.
//
// When ctx is canceled and the request has no RequestID, no hold is left behind: the decision goes on in the background, and
// what it held is released. With a RequestID the same request is expected again, and finds its hold.
func (c *Client) Decide(ctx context.Context, request DecideRequest, options ...CallOption) (*Decision, error) {
	timeout, err := c.begin(options)
	if err != nil {
		return nil, err
	}
	owned := request.RequestID == ""
	if owned {
		request.RequestID = newRequestID()
	}
	return c.decide(ctx, request, owned, timeout)
}

// decide asks, and where the sidecar is down WhenDown. owned: nobody else knows the request id, so that a canceled
// decision is undone.
func (c *Client) decide(ctx context.Context, request DecideRequest, owned bool, timeout time.Duration) (*Decision, error) {
	if c.closing.Load() {
		return nil, ErrClosed
	}
	message, err := encodeDecide(request)
	if err != nil {
		return nil, err
	}
	var response *keyturnv1.DecideResponse
	if owned {
		response, err = c.askOwned(ctx, message, timeout)
	} else {
		response, err = invoke(ctx, c, timeout, c.routing.Decide, message)
	}
	if err == nil {
		return decodeDecision(response), nil
	}
	if fault, ok := errors.AsType[*Error](err); ok && c.whenDown != nil && errors.Is(fault, ErrUnavailable) {
		pass, asked := c.whenDown(ctx, request, fault)
		if asked != nil {
			return nil, asked
		}
		if pass {
			return &Decision{Message: "The sidecar is down: the platform's own credential pays.", Unmetered: true}, nil
		}
	}
	return nil, err
}

// askOwned asks in a goroutine of its own, which undoes the decision when ctx is canceled meanwhile.
func (c *Client) askOwned(ctx context.Context, message *keyturnv1.DecideRequest, timeout time.Duration) (
	*keyturnv1.DecideResponse, error,
) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, canceled()
	}
	type answer struct {
		response *keyturnv1.DecideResponse
		err      error
	}
	answered := make(chan answer, 1)
	go func() {
		asking := context.WithoutCancel(ctx)
		if deadline, ok := ctx.Deadline(); ok {
			bounded, cancel := context.WithDeadline(asking, deadline)
			defer cancel()
			asking = bounded
		}
		response, err := invoke(asking, c, timeout, c.routing.Decide, message)
		answered <- answer{response, err}
	}()
	select {
	case got := <-answered:
		return got.response, got.err
	case <-ctx.Done():
	}
	if !errors.Is(ctx.Err(), context.Canceled) {
		got := <-answered // at the same deadline
		return got.response, got.err
	}
	undone := c.outbox.expect()
	go func() {
		got := <-answered
		ticket := decodeDecision(got.response).Ticket
		if got.err != nil || ticket == nil {
			undone(nil)
			return
		}
		undone(&RecordRequest{Settles: ticket, Outcome: OutcomeNeverSent})
	}()
	return nil, canceled()
}

// Record says what became of a request, once: the same record again gets the first answer. When ctx is canceled meanwhile,
// it is carried on in the background.
func (c *Client) Record(ctx context.Context, record RecordRequest, options ...CallOption) (*Recorded, error) {
	timeout, err := c.begin(options)
	if err != nil {
		return nil, err
	}
	message, err := encodeRecord(record)
	if err != nil {
		return nil, err
	}
	response, err := invoke(ctx, c, timeout, c.routing.Record, message)
	if err != nil {
		c.carryOn(err, record)
		return nil, err
	}
	return decodeRecorded(response), nil
}

// carryOn hands records whose caller went away to the background.
func (c *Client) carryOn(err error, records ...RecordRequest) {
	if errors.Is(err, context.Canceled) {
		for _, record := range records {
			c.outbox.pushOrReport(record)
		}
	}
}

// RecordLater puts a record into the queue that a goroutine in the background sends, and returns at once. It is
// ErrQueueFull when the queue is full, with the record still the caller's. What does not get through goes to
// Options.OnUnsent.
func (c *Client) RecordLater(record RecordRequest) error { return c.outbox.push(record) }

// Flush waits until every record that was queued before is sent or unsent, or ctx is done.
func (c *Client) Flush(ctx context.Context) error {
	if c.closing.Load() {
		return ErrClosed
	}
	return c.outbox.flush(ctx)
}

// Redeem fetches the secret behind a handle, once per handle. It is never retried, because it may have been carried out:
// decide again for a new handle.
func (c *Client) Redeem(ctx context.Context, handle SealedHandle, options ...CallOption) (Secret, error) {
	timeout, err := c.begin(options)
	if err != nil {
		return Secret{}, err
	}
	if err := requireText("the handle", handle.Text()); err != nil {
		return Secret{}, err
	}
	response, err := invokeOnce(ctx, c, timeout, c.routing.Redeem, &keyturnv1.RedeemRequest{KeyHandle: handle.Text()})
	return NewSecret(response.GetSecret()), err
}

// Explain tells what Decide would answer now, and why. It places no hold and tells no secret.
func (c *Client) Explain(ctx context.Context, request DecideRequest, options ...CallOption) (*Explanation, error) {
	timeout, err := c.begin(options)
	if err != nil {
		return nil, err
	}
	message, err := encodeDecide(request)
	if err != nil {
		return nil, err
	}
	response, err := invoke(ctx, c, timeout, c.routing.Explain, &keyturnv1.ExplainRequest{Decide: message})
	if err != nil {
		return nil, err
	}
	return decodeExplanation(response), nil
}

// DecideMany makes up to 500 decisions in one call: an answer or an error for each, in order. WhenDown is not asked.
func (c *Client) DecideMany(ctx context.Context, requests []DecideRequest, options ...CallOption) ([]DecideResult, error) {
	timeout, err := c.begin(options)
	if err != nil || len(requests) == 0 {
		return nil, err
	}
	batch := &keyturnv1.BatchDecideRequest{}
	for _, request := range requests {
		request.RequestID = given(request.RequestID, newRequestID())
		message, err := encodeDecide(request)
		if err != nil {
			return nil, err
		}
		batch.Requests = append(batch.Requests, message)
	}
	response, err := invoke(ctx, c, timeout, c.routing.BatchDecide, batch)
	if err != nil {
		return nil, err
	}
	return decodeItems(response.GetResults(), len(requests), decodeDecideResult), nil
}

// RecordMany makes up to 500 records in one call: an answer or an error for each, in order. When ctx is canceled meanwhile,
// they are carried on in the background.
func (c *Client) RecordMany(ctx context.Context, records []RecordRequest, options ...CallOption) ([]RecordResult, error) {
	timeout, err := c.begin(options)
	if err != nil || len(records) == 0 {
		return nil, err
	}
	batch := &keyturnv1.BatchRecordRequest{}
	for _, record := range records {
		message, err := encodeRecord(record)
		if err != nil {
			return nil, err
		}
		batch.Requests = append(batch.Requests, message)
	}
	response, err := invoke(ctx, c, timeout, c.routing.BatchRecord, batch)
	if err != nil {
		c.carryOn(err, records...)
		return nil, err
	}
	return decodeItems(response.GetResults(), len(records), decodeRecordResult), nil
}

// sendBatch is one attempt of the background to record, with an error for each record.
func (c *Client) sendBatch(ctx context.Context, batch []*keyturnv1.RecordRequest) ([]error, error) {
	response, err := invokeOnce(ctx, c, batchTimeout, c.routing.BatchRecord, &keyturnv1.BatchRecordRequest{Requests: batch})
	if err != nil {
		return nil, err
	}
	failures := make([]error, len(batch))
	for i, result := range decodeItems(response.GetResults(), len(batch), decodeRecordResult) {
		failures[i] = result.Err
	}
	return failures, nil
}

// decodeItems is the answer to each of the items asked, also where the sidecar gave fewer.
func decodeItems[Item, Result any](items []*Item, asked int, decode func(*Item) Result) []Result {
	results := make([]Result, asked)
	for i := range results {
		var item *Item
		if i < len(items) {
			item = items[i]
		}
		results[i] = decode(item)
	}
	return results
}

type method[Request, Response any] func(context.Context, *Request, ...grpc.CallOption) (*Response, error)

// invoke makes a call within its deadline, and makes it again as Retries says.
func invoke[Request, Response any](
	ctx context.Context, c *Client, timeout time.Duration, method method[Request, Response], request *Request,
) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for made := 1; ; made++ {
		response, err := attempt(ctx, c, method, request)
		fault, ok := errors.AsType[*Error](err)
		if !ok || fault.Code != codes.Unavailable {
			return response, err
		}
		deadline, _ := ctx.Deadline()
		wait, fits := fit(fault.RetryAfter, c.retries.jitter(made), time.Until(deadline))
		if !fits || made >= c.retries.Attempts || c.down.Load() {
			c.down.Store(!fault.fromSidecar)
			return nil, err
		}
		if err := pause(ctx, c.closed, wait); err != nil {
			return nil, err
		}
	}
}

// invokeOnce makes a call that is not repeated here. It says nothing of whether the sidecar is down when it fails.
func invokeOnce[Request, Response any](
	ctx context.Context, c *Client, timeout time.Duration, method method[Request, Response], request *Request,
) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return attempt(ctx, c, method, request)
}

// attempt makes a call once. The error is an *Error, ErrClosed, or one that is context.Canceled.
func attempt[Request, Response any](
	ctx context.Context, c *Client, method method[Request, Response], request *Request,
) (*Response, error) {
	// Metadata of the caller's own calls stays here: it may hold somebody else's credentials.
	carried := metadata.MD{}
	if c.bearer.Reveal() != "" {
		carried.Set("authorization", c.bearer.Reveal())
	}
	response, failure := method(metadata.NewOutgoingContext(ctx, carried), request)
	if failure == nil {
		c.down.Store(false)
		return response, nil
	}
	fault := errorOf(failure)
	switch {
	case fault.fromSidecar:
		c.down.Store(false)
	case isClosed(c.closed):
		return nil, ErrClosed
	case errors.Is(ctx.Err(), context.Canceled):
		return nil, canceled()
	case fault.Code != codes.Unavailable && fault.Code != codes.DeadlineExceeded:
		c.down.Store(false) // grpc on the other side, e.g. UNIMPLEMENTED: somebody is there
	}
	return nil, fault
}

// pause waits, unless the call's caller goes away or the client is closed meanwhile.
func pause(ctx context.Context, closed <-chan struct{}, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-closed:
		return ErrClosed
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return canceled()
		}
		return &Error{Code: codes.DeadlineExceeded, Message: "the deadline passed before the next attempt"}
	}
}

func isClosed(channel <-chan struct{}) bool {
	select {
	case <-channel:
		return true
	default:
		return false
	}
}

// newRequestID is a random UUIDv4 as 32 hex digits.
func newRequestID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // it never fails
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return hex.EncodeToString(id[:])
}
