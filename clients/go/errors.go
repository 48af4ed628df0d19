package keyturn

import (
	"context"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

// An Error is a fault: the sidecar did not answer, or refused the call. Its kind is matched with errors.Is:
//
//	ErrInvalidArgument     a field is wrong (FieldViolations), or a token is garbled
//	ErrUnauthenticated     no token or certificate, or one that the sidecar does not know
//	ErrPermissionDenied    the caller's role may not do this
//	ErrNotFound            no such user, or a hold settled and forgotten (Resource)
//	ErrAlreadyExists       the same request or record was seen with other contents
//	ErrFailedPrecondition  too late, redeemed already, no longer usable
//	ErrResourceExhausted   the sidecar is overloaded, or the message too large
//	ErrUnavailable         the sidecar or its store is out of reach
//	ErrDeadlineExceeded    no answer in time, the call may have been carried out; it is ErrUnavailable too
//	ErrInternal            a defect of the sidecar; Metadata may hold its error id
//
// Any other status (UNIMPLEMENTED, …) is an Error without a kind. CANCELLED by the other side is UNAVAILABLE: a sidecar that
// ends drops so what it has not looked at yet. A DeniedError is no Error.
//
// Its text is fit for logs: it never holds a secret.
type Error struct {
	Code codes.Code
	// Reason is the stable name for programs (ErrorInfo.reason), e.g. STORE_UNAVAILABLE; may be empty.
	Reason string
	// Message is one plain sentence.
	Message string
	// FieldViolations are the fields that the sidecar refused.
	FieldViolations []FieldViolation
	// RetryAfter is how long the sidecar asks to wait (RetryInfo); 0 when it does not say.
	RetryAfter time.Duration
	// Resource is what a NOT_FOUND did not find; nil when the sidecar does not say.
	Resource *Resource
	// Metadata is what ErrorInfo says besides, e.g. an error id to quote to the operators.
	Metadata map[string]string

	// fromSidecar: it has an ErrorInfo, so that it was not the transport that made it.
	fromSidecar bool
}

// A FieldViolation is a field that the sidecar refused, e.g. user_id, and why.
type FieldViolation struct{ Field, Description string }

// A Resource is what was not found, e.g. user and its id.
type Resource struct{ Type, Name, Description string }

// The kinds of an Error, for errors.Is.
var (
	ErrInvalidArgument    error = kind(codes.InvalidArgument)
	ErrUnauthenticated    error = kind(codes.Unauthenticated)
	ErrPermissionDenied   error = kind(codes.PermissionDenied)
	ErrNotFound           error = kind(codes.NotFound)
	ErrAlreadyExists      error = kind(codes.AlreadyExists)
	ErrFailedPrecondition error = kind(codes.FailedPrecondition)
	ErrResourceExhausted  error = kind(codes.ResourceExhausted)
	ErrUnavailable        error = kind(codes.Unavailable)
	ErrDeadlineExceeded   error = kind(codes.DeadlineExceeded)
	ErrInternal           error = kind(codes.Internal)
)

// What is refused here, before anything is sent.
var (
	// ErrInvalid: an option or an argument cannot work. The error says which.
	ErrInvalid = errors.New("keyturn: invalid")
	// ErrClosed: the client is closed.
	ErrClosed = errors.New("keyturn: the client is closed")
	// ErrEnded: the call has ended, and takes nothing any more.
	ErrEnded = errors.New("keyturn: the call has ended")
	// ErrQueueFull: the queue of records in the background is full. The record is still the caller's.
	ErrQueueFull = errors.New("keyturn: the queue of records is full")
)

// A DeniedError says that the policy said no; Decision.Denial says why. Request and KeyRefused alone return it. It is
// an answer and no fault, so no kind matches it: letting requests pass on ErrUnavailable never lets a denial pass.
type DeniedError struct{ Decision *Decision }

// Error returns the reason of the denial, and the sidecar's sentence.
func (e *DeniedError) Error() string {
	if e.Decision.Denial == nil { // a route that only a newer sidecar knows
		return "keyturn: denied: " + e.Decision.Message
	}
	return fmt.Sprintf("keyturn: denied: %v: %s", e.Decision.Denial.Reason, e.Decision.Message)
}

// Error returns CODE (REASON): message [field: description; …].
func (e *Error) Error() string {
	var text strings.Builder
	text.WriteString(code.Code(e.Code).String())
	if e.Reason != "" {
		text.WriteString(" (" + e.Reason + ")")
	}
	text.WriteString(": " + e.Message)
	separator := " ["
	for _, each := range e.FieldViolations {
		text.WriteString(separator + each.Field + ": " + each.Description)
		separator = "; "
	}
	if len(e.FieldViolations) > 0 {
		text.WriteString("]")
	}
	return text.String()
}

// Is reports whether target is the kind of e; DEADLINE_EXCEEDED is ErrUnavailable and context.DeadlineExceeded too.
func (e *Error) Is(target error) bool {
	if target == context.DeadlineExceeded {
		return e.Code == codes.DeadlineExceeded
	}
	asked, ok := target.(kind)
	if !ok {
		return false
	}
	switch e.Code {
	case codes.DeadlineExceeded:
		return asked == kind(codes.DeadlineExceeded) || asked == kind(codes.Unavailable)
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return asked == kind(codes.Internal)
	}
	return asked == kind(e.Code)
}

// kind is what errors.Is matches an Error with.
type kind codes.Code

func (k kind) Error() string { return "keyturn: " + code.Code(k).String() }

// canceled is what a call returns whose caller went away. Like the rest of grpc's own errors, grpc's is left behind:
// what it prints is not ours to vouch for.
func canceled() error { return fmt.Errorf("keyturn: %w", context.Canceled) }

// invalid is ErrInvalid with what is wrong.
func invalid(format string, arguments ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, arguments...)...)
}

// errorOf is the fault that grpc reports, of a call that nobody here canceled.
func errorOf(failure error) *Error {
	reported, _ := status.FromError(failure)
	if statusCode, message, ok := unmasked(reported.Message()); ok {
		return build(statusCode, message, nil)
	}
	statusCode, details := reported.Code(), reported.Proto().GetDetails()
	if statusCode == codes.Canceled && len(details) == 0 {
		// Not by us: a caller who is gone gets no fault. It is what gRPC's core makes of calls that a server which ends
		// has not looked at yet (github.com/grpc/grpc/issues/41785).
		statusCode = codes.Unavailable
	}
	return build(statusCode, reported.Message(), details)
}

// errorOfItem is the fault of one item of a batch.
func errorOfItem(item *keyturnv1.Status) *Error {
	statusCode := codes.Code(item.GetCode())
	if _, ok := code.Code_name[item.GetCode()]; !ok || statusCode == codes.OK {
		statusCode = codes.Unknown
	}
	return build(statusCode, item.GetMessage(), item.GetDetails())
}

// maxRetryAfter leaves room for a jitter to be added.
const maxRetryAfter time.Duration = math.MaxInt64 / 2

// build makes an Error. Details are an extra: those that are garbled are left out.
func build(statusCode codes.Code, message string, details []*anypb.Any) *Error {
	e := &Error{Code: statusCode, Message: message}
	for _, packed := range details {
		detail, err := packed.UnmarshalNew()
		if err != nil {
			continue
		}
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			e.fromSidecar = true
			e.Reason = detail.GetReason()
			e.Metadata = detail.GetMetadata()
		case *errdetails.BadRequest:
			e.FieldViolations = nil
			for _, each := range detail.GetFieldViolations() {
				e.FieldViolations = append(e.FieldViolations, FieldViolation{each.GetField(), each.GetDescription()})
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = min(max(0, detail.GetRetryDelay().AsDuration()), maxRetryAfter)
		case *errdetails.ResourceInfo:
			e.Resource = &Resource{detail.GetResourceType(), detail.GetResourceName(), detail.GetDescription()}
		}
	}
	return e
}

// mismatch is how grpc-go reports details whose code is not that of the status: as INTERNAL, with the true status in
// its text. Where a later grpc-go says it otherwise, INTERNAL it is.
var mismatch = regexp.MustCompile(
	`^grpc-status-details-bin mismatch: grpc-status=(\w+), grpc-message=("(?:[^"\\]|\\.)*"), `)

// unmasked finds the status that garbled details have masked.
func unmasked(text string) (codes.Code, string, bool) {
	found := mismatch.FindStringSubmatch(text)
	if found == nil {
		return 0, "", false
	}
	message, err := strconv.Unquote(found[2])
	if err != nil {
		return 0, "", false
	}
	for each := range codes.Code(len(code.Code_name)) {
		if each.String() == found[1] {
			return each, message, true
		}
	}
	return 0, "", false
}
